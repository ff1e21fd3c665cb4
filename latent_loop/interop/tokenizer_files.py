"""The tokenizer of a run as the files that `transformers` reads, and back."""

import json
from pathlib import Path
from typing import Any

from latent_loop import storage, tokenizer
from latent_loop.config import DataConfig
from latent_loop.interop import files
from latent_loop.shards import manifest
from latent_loop.tokenizer import bpe, utf8

TOKENIZER, ABOUT = 'tokenizer.json', 'tokenizer_config.json'
_BYTE_SPECIALS = ('<bos>', '<eos>', '<pad>', *(f'<reserved_{i}>' for i in range(utf8.VOCAB_SIZE - utf8.PAD - 1)))
_END_OF_TURN = '<|end_turn|>'  # ends an answer of a chat


def files_of(cfg: DataConfig) -> dict[str, str]:
  """Name -> content of the files; none where a run reads token ids without a tokenizer. Raises BadInput."""
  if cfg.source == 'parquet' and not cfg.tokenizer:
    return {}
  path = _path_of(cfg)
  if path is None:
    return {TOKENIZER: json.dumps(_bytes(), ensure_ascii=True, indent=1) + '\n', ABOUT: _about_bytes()}
  content, about = path.read_text(encoding='utf-8'), path.with_name(ABOUT)
  return {TOKENIZER: content, ABOUT: about.read_text(encoding='utf-8') if about.is_file() else _about(path)}


def generation_config(cfg: DataConfig, written: dict[str, str]) -> dict[str, Any]:
  """generation_config.json beside the files that `files_of` gave: how the reference samples, what ends an answer."""
  out: dict[str, Any] = {'do_sample': True, 'temperature': 0.7}
  if not written:
    return out
  path = _path_of(cfg)
  ours = tokenizer.load('bytes' if path is None else str(path))
  tokens = json.loads(written[TOKENIZER]).get('added_tokens', [])
  turns = [token['id'] for token in tokens if token.get('content') == _END_OF_TURN]
  ends = [ours.eos, *turns]
  return {'bos_token_id': ours.bos, 'eos_token_id': ends if turns else ours.eos, 'pad_token_id': ours.pad, **out}


def is_bytes(path: Path) -> bool:
  """Whether a tokenizer.json is the one that an export of a byte model holds; raises BadInput when it is no JSON."""
  without = {'post_processor': None}  # which decides how other programs begin a text, not what a token is
  return files.read_json(path) | without == _bytes() | without


def _path_of(cfg: DataConfig) -> Path | None:
  """The tokenizer.json of a run that has one; None: its tokens are bytes."""
  if cfg.source in ('parquet', 'chat') and cfg.tokenizer:
    return Path(cfg.tokenizer)
  if cfg.source == 'prepared':
    folder = storage.path(cfg.paths[0], 'config.data.paths')
    return folder / manifest.TOKENIZER if manifest.read(folder).tokenizer != 'bytes' else None
  return None


def _about(path: Path) -> str:
  """tokenizer_config.json for a tokenizer.json that came without one."""
  ours, content = tokenizer.load(str(path)), files.read_json(path)
  names = {token['id']: token['content'] for token in content['added_tokens']}
  roles = {'bos_token': ours.bos, 'eos_token': ours.eos, 'pad_token': ours.pad}
  about = {role: names[token] for role, token in roles.items() if token in names}
  chats = {'chat_template': bpe.CHAT_TEMPLATE} if _END_OF_TURN in names.values() else {}
  return json.dumps({**about, **chats, 'tokenizer_class': 'PreTrainedTokenizerFast'}, indent=2) + '\n'


def _about_bytes() -> str:
  about = dict(zip(('bos_token', 'eos_token', 'pad_token'), _BYTE_SPECIALS, strict=False))
  return json.dumps({**about, 'tokenizer_class': 'PreTrainedTokenizerFast'}, indent=2) + '\n'


def _bytes() -> dict[str, Any]:
  """Bytes as a byte-level BPE without merges: token i is byte i, then the special tokens; a text begins with <bos>."""
  added = [
    {'id': 256 + i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
     'special': True}
    for i, name in enumerate(_BYTE_SPECIALS)
  ]  # fmt: skip
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
           'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
           'vocab': {_letter(byte): byte for byte in range(256)}, 'merges': []}  # fmt: skip
  bos, text, other = (
    {'SpecialToken': {'id': _BYTE_SPECIALS[0], 'type_id': 0}},
    *({'Sequence': {'id': name, 'type_id': i}} for i, name in enumerate('AB')),
  )
  begin = {'type': 'TemplateProcessing', 'single': [bos, text], 'pair': [bos, text, other],
           'special_tokens': {'<bos>': {'id': '<bos>', 'ids': [utf8.BOS], 'tokens': ['<bos>']}}}  # fmt: skip
  return {
    'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
    'pre_tokenizer': level, 'post_processor': begin, 'decoder': level, 'model': model,
  }  # fmt: skip


def _letter(byte: int) -> str:
  """The letter that byte-level BPE writes for a byte: its own where it is printable, else one from 256 up."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  return chr(byte) if byte in shown else chr(256 + [b for b in range(256) if b not in shown].index(byte))
