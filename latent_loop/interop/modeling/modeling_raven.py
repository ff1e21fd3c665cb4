"""A depth-recurrent language model (arXiv 2502.05171) for `transformers`; lies beside its weights.

  model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
  model.generate(**tokenizer(text, return_tensors='pt'), num_steps=32, exit_criterion='kl')

num_steps: iterations of the core for each token, the mean of training where it is not given. exit_criterion: 'kl',
'entropy-diff', 'argmax-stability' or 'latent-diff': while decoding with a cache, each row's token stops when its
criterion is met; prompts always take num_steps. init_scale: factor on the drawn initial state, 0 for none.

Letters at the end of a name: B batch, T new tokens, S tokens so far, D width, N heads, H head width, V vocabulary.
"""

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_raven import RavenConfig

THRESHOLDS = {'none': 0.0, 'kl': 5e-4, 'entropy-diff': 1e-3, 'argmax-stability': 5, 'latent-diff': 0.03}


@dataclasses.dataclass
class RavenOutput(ModelOutput):
  """depths: [B], the iterations that each row's last token took."""

  loss: torch.Tensor | None = None
  logits: torch.Tensor | None = None
  cache: DynamicCache | None = None
  depths: torch.Tensor | None = None


class RMSNorm(nn.Module):
  def __init__(self, width, eps):
    super().__init__()
    self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

  def forward(self, x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


@dataclasses.dataclass
class Place:
  """Where a pass through a block finds and leaves keys and values.

  turn: cosine and sine [B, 1, T, H/2]. mask: [B, 1, T, S]. layer: the place in the cache. keep: whether what the pass
  makes is stored. running, last: rows that have stopped store what they stored before.
  """

  turn: tuple
  mask: torch.Tensor
  cache: DynamicCache | None
  layer: int
  keep: bool = True
  running: torch.Tensor | None = None
  last: dict = dataclasses.field(default_factory=dict)

  def join(self, k, v):
    if self.running is not None:
      if self.last:
        row = self.running[:, None, None, None]
        k, v = torch.where(row, k, self.last['k']), torch.where(row, v, self.last['v'])
      self.last.update(k=k, v=v)
    if self.cache is None:
      return k, v
    if self.keep:
      return self.cache.update(k, v, self.layer)
    layers = self.cache.layers
    if self.layer >= len(layers) or layers[self.layer].get_seq_length() == 0:
      return k, v
    return torch.cat([layers[self.layer].keys, k], 2), torch.cat([layers[self.layer].values, v], 2)


def rotate(x, turn):
  """Pairs of neighbors (2i, 2i + 1) by their angle, in float32."""
  cos, sin = turn
  a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
  return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
  def __init__(self, config):
    super().__init__()
    D, self.N = config.n_embd, config.n_heads
    self.Wqkv = nn.Linear(D, 3 * D, bias=False)
    self.proj = nn.Linear(D, D, bias=False)
    self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.N, D // self.N)) if config.qk_bias else None

  def forward(self, x, place):
    q, k, v = (part.unflatten(-1, (self.N, -1)) for part in self.Wqkv(x).chunk(3, -1))
    if self.qk_bias is not None:
      q, k = q + self.qk_bias[0], k + self.qk_bias[1]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = place.join(rotate(k, place.turn), v)
    y = F.scaled_dot_product_attention(rotate(q, place.turn), k, v, attn_mask=place.mask)
    return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
    self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

  def forward(self, x):
    gate, up = self.fc(x).chunk(2, -1)
    return self.proj(F.silu(gate) * up)


class SandwichBlock(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(config.n_embd, config.norm_eps) for _ in range(4))
    self.attn, self.mlp = Attention(config), MLP(config)

  def forward(self, x, place):
    x = self.norm_2(x + self.attn(self.norm_1(x), place))
    return self.norm_4(x + self.mlp(self.norm_3(x)))


class Exit:
  """When rows have thought enough; each check compares with the one before."""

  def __init__(self, kind, threshold):
    if kind not in THRESHOLDS:
      raise ValueError(f'exit_criterion={kind!r}: no such criterion; choose one of {", ".join(THRESHOLDS)}')
    self.kind, self.threshold = kind, THRESHOLDS[kind] if threshold is None else threshold
    self.log_p = self.entropy = self.best = self.stable = None

  def leaves(self, before, s, read):
    """Which rows [B] leave with the state s, one iteration after `before`; read() gives the logits of s."""
    if self.kind == 'none':
      return torch.zeros(len(s), dtype=torch.bool, device=s.device)
    if self.kind == 'latent-diff':
      norm = lambda x: x[:, -1].float().norm(dim=-1)
      return norm(s - before) / norm(s) < self.threshold
    logits = read()[:, -1].float()
    log_p, best = logits.log_softmax(-1), logits.argmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if self.log_p is None:
      self.log_p = torch.full_like(log_p, -math.log(log_p.shape[-1]))
      self.entropy, self.best = torch.full_like(entropy, 100.0), torch.full_like(best, -1)
      self.stable = torch.zeros_like(best)
    kl = (self.log_p.exp() * (self.log_p - log_p)).sum(-1)
    change = (entropy - self.entropy).abs()
    self.stable = torch.where(best == self.best, self.stable + 1, 0)
    self.log_p, self.entropy, self.best = log_p, entropy, best
    if self.kind == 'argmax-stability':
      return self.stable >= self.threshold
    return (kl if self.kind == 'kl' else change) < self.threshold


class RavenPreTrainedModel(PreTrainedModel):
  config_class = RavenConfig
  base_model_prefix = 'transformer'
  _no_split_modules = ['SandwichBlock']
  _supports_sdpa = True
  _keys_to_ignore_on_load_unexpected = ['freqs_cis']  # computed, for rows of any length

  @torch.no_grad()
  def _init_weights(self, module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
      nn.init.trunc_normal_(module.weight, std=math.sqrt(2 / (5 * self.config.n_embd)))
    elif isinstance(module, RMSNorm):
      nn.init.ones_(module.weight)
    elif isinstance(module, Attention) and module.qk_bias is not None:
      nn.init.zeros_(module.qk_bias)


class RavenForCausalLM(RavenPreTrainedModel, GenerationMixin):
  _tied_weights_keys = {'lm_head.weight': 'transformer.wte.weight'}

  def __init__(self, config):
    super().__init__(config)
    blocks = lambda count: nn.ModuleList(SandwichBlock(config) for _ in range(count))
    self.transformer = nn.ModuleDict({
      'wte': nn.Embedding(config.vocab_size, config.n_embd),
      'prelude': blocks(config.n_layers_in_prelude),
      'adapter': nn.Linear(2 * config.n_embd, config.n_embd, bias=False),
      'core_block': blocks(config.n_layers_in_recurrent_block),
      'coda': blocks(config.n_layers_in_coda),
      'ln_f': RMSNorm(config.n_embd, config.norm_eps),
    })  # fmt: skip
    self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    self.post_init()

  def get_input_embeddings(self):
    return self.transformer.wte

  def set_input_embeddings(self, value):
    self.transformer.wte = value

  def get_output_embeddings(self):
    return self.lm_head

  def set_output_embeddings(self, value):
    self.lm_head = value

  def forward(
    self,
    input_ids,
    attention_mask=None,
    position_ids=None,
    cache=None,
    labels=None,
    use_cache=None,
    *,
    num_steps=None,
    init_scale=1.0,
    exit_criterion='none',
    exit_threshold=None,
    logits_to_keep=0,
    **kwargs,
  ):
    """Logits [B, T, V]. labels: as input_ids, -100 where nothing counts; the shift by one happens here.

    attention_mask: [B, S], 0 for padding at either side. A cache serves one num_steps; a smaller one may follow.
    """
    num_steps = int(self.config.mean_recurrence if num_steps is None else num_steps)
    if num_steps < 1:
      raise ValueError(f'num_steps={num_steps}: the core runs at least once')
    if cache is None and use_cache:
      cache = DynamicCache()
    past = 0 if cache is None else cache.get_seq_length()
    slots = self._slots(cache, past, num_steps)
    turn, mask = self._places(input_ids, attention_mask, position_ids, past)
    P, K = self.config.n_layers_in_prelude, self.config.n_layers_in_coda
    e = self.transformer.wte(input_ids) * math.sqrt(self.config.n_embd)
    for i, block in enumerate(self.transformer.prelude):
      e = block(e, Place(turn, mask, cache, i))
    read = lambda s, keep: self._coda(s, [Place(turn, mask, cache, P + i, keep) for i in range(K)])
    leave = Exit(exit_criterion if past and input_ids.shape[1] == 1 else 'none', exit_threshold)
    s, depths = self._think(e, init_scale, num_steps, slots, Place(turn, mask, cache, P + K), leave, read)
    y = read(s, True)
    logits = self.lm_head(y[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else y[:, logits_to_keep]).float()
    loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
    return RavenOutput(loss=loss, logits=logits, cache=cache, depths=depths)

  def _slots(self, cache, past, num_steps):
    """How many iterations have keys and values of their own in the cache."""
    if not past:
      return num_steps
    outer, C = self.config.n_layers_in_prelude + self.config.n_layers_in_coda, len(self.transformer.core_block)
    slots = (len(cache.layers) - outer) // C
    if num_steps > slots:
      raise ValueError(f'num_steps={num_steps}: this cache was begun with {slots}; begin a new one to think longer')
    return slots

  def _places(self, input_ids, attention_mask, position_ids, past):
    """(cosine and sine of every new token's position, what each may see). Padding sees itself, and nobody sees it."""
    T, device = input_ids.shape[1], input_ids.device
    at = torch.arange(past + T, device=device)
    mask = (at[None] <= at[past:, None])[None, None]
    if attention_mask is not None:
      real = attention_mask[:, : past + T].bool()
      mask = mask & real[:, None, None] | (at[None] == at[past:, None])[None, None]
      if position_ids is None:
        position_ids = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]
    elif position_ids is None:
      position_ids = at[None, past:]
    half = self.config.n_embd // self.config.n_heads // 2
    frequencies = self.config.rope_base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = position_ids[:, None, :, None].float() * frequencies
    return (angles.cos(), angles.sin()), mask

  def _think(self, e, init_scale, num_steps, slots, place, leave, read):
    """(the state of every token when its row leaves, iterations [B])."""
    s, C = self._initial_state(e) * init_scale, len(self.transformer.core_block)
    running = torch.ones(len(e), dtype=torch.bool, device=e.device)
    depths = torch.zeros(len(e), dtype=torch.long, device=e.device)
    last = [{} for _ in range(C)]
    for t in range(num_steps):
      before, x = s, self.transformer.adapter(torch.cat([s, e], -1))
      for i, block in enumerate(self.transformer.core_block):
        there = dataclasses.replace(place, layer=place.layer + t * C + i, running=running, last=last[i])
        x = block(x, there)
      s, depths = torch.where(running[:, None, None], x, before), depths + running
      running = running & ~leave.leaves(before, s, lambda s=s: self.lm_head(read(s, False)))
      if not running.any():
        break
    if place.cache is not None:  # a later token that thinks longer sees this one's last iteration
      for layer in range((t + 1) * C, slots * C):
        place.cache.update(last[layer % C]['k'], last[layer % C]['v'], place.layer + layer)
    return s, depths

  def _initial_state(self, e):
    if self.config.state_init == 'zero':
      return torch.zeros_like(e)
    std = math.sqrt(2 / (5 * self.config.n_embd))
    drawn = torch.empty_like(e, dtype=torch.float32)
    nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std)
    return (drawn * math.sqrt(self.config.n_embd)).to(e.dtype)

  def _coda(self, s, places):
    x = self.transformer.ln_f(s)
    for block, place in zip(self.transformer.coda, places, strict=True):
      x = block(x, place)
    return self.transformer.ln_f(x)

  def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
    """A cache that grows a layer for every iteration; the usual one has as many as the config names."""
    if model_kwargs.get('cache') is None and generation_config.use_cache is not False:
      if generation_config.cache_implementation not in (None, 'dynamic'):
        raise ValueError(f'cache_implementation={generation_config.cache_implementation!r}: only dynamic is supported')
      model_kwargs['cache'] = DynamicCache()
      return
    super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
