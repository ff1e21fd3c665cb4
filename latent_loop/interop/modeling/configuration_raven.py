"""The config of a depth-recurrent language model for `transformers`; lies beside its weights."""

from transformers import PretrainedConfig


class RavenConfig(PretrainedConfig):
  """Sizes of Huginn (arXiv 2502.05171), under the names of the reference's config.json."""

  model_type = 'huginn_raven'
  attribute_map = {
    'hidden_size': 'n_embd',
    'num_hidden_layers': 'n_layers',
    'max_position_embeddings': 'block_size',
  }
  keys_to_ignore_at_inference = ['cache']

  def __init__(
    self,
    *,
    n_embd=5280,
    n_heads=55,
    intermediate_size=17920,
    n_layers_in_prelude=2,
    n_layers_in_recurrent_block=4,
    n_layers_in_coda=2,
    vocab_size=65536,
    block_size=4096,
    mean_recurrence=32,
    qk_bias=True,
    norm_eps=1e-6,
    rope_base=50000.0,
    state_init='like-init',
    tie_word_embeddings=True,
    **kwargs,
  ):
    self.n_embd, self.n_heads, self.intermediate_size = n_embd, n_heads, intermediate_size
    self.num_attention_heads = self.num_key_value_heads = n_heads
    self.n_layers_in_prelude, self.n_layers_in_coda = n_layers_in_prelude, n_layers_in_coda
    self.n_layers_in_recurrent_block = n_layers_in_recurrent_block
    self.n_layers = n_layers_in_prelude + n_layers_in_recurrent_block + n_layers_in_coda
    self.vocab_size, self.block_size, self.mean_recurrence = vocab_size, block_size, mean_recurrence
    self.qk_bias, self.norm_eps, self.rope_base, self.state_init = qk_bias, norm_eps, rope_base, state_init
    for derived in ('n_layers', 'num_attention_heads', 'num_key_value_heads'):
      kwargs.pop(derived, None)
    super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
