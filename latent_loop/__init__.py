"""latent_loop: pretraining and test-time compute for depth-recurrent language models.

    e   = P(x)                       prelude: tokens to embedded input
    s_0 ~ N(0, sigma^2)              a random latent state
    s_i = R(e, s_{i-1}), i = 1..r    core: the same block, applied r times
    p   = C(s_r)                     coda: state to next-token distribution

Training draws r at random at each step and backpropagates through the last k applications only
(arXiv 2502.05171). WORKSPACE.md is the map of this package.
"""
