"""Continues prompts: python -m launch.generate --workdir=runs/tiny_text --prompt='def ' --depth=16

--prompts=FILE has one prompt per line. --prompts=- reads JSON lines from standard input, such as {"prompt": "def ",
"depth": 4, "seed": 1}, whose keys are the flags below, and answers each with a JSON line. --chat is a conversation in
the terminal, where the background of a token shows its depth.
"""

import dataclasses
import json
import math
import os
import sys

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_HF = flags.DEFINE_string('hf', None, 'in its place: folder of a Huginn checkpoint in the Hugging Face layout')
_PROMPT = flags.DEFINE_string('prompt', None, 'text to continue')
_PROMPTS = flags.DEFINE_string(
  'prompts', None, 'file with one prompt per line, or - for JSON lines from standard input'
)
_CHAT = flags.DEFINE_bool('chat', False, 'a conversation instead of prompts')
_TENSOR = flags.DEFINE_integer('tensor', 1, 'devices that share each layer, for a model too large for one', 1)
_CACHE = flags.DEFINE_string('cache', 'full', 'full, latest, ring:M or first:M: which depths share keys and values')
_EXIT = flags.DEFINE_string(
  'exit', 'none', 'KIND[:THRESHOLD[:MIN_DEPTH[:EVERY]]], such as kl:5e-4: when a token has thought enough'
)
_DEPTH = flags.DEFINE_integer('depth', None, 'iterations of the core per token; default: the mean depth in training')
_WARM = flags.DEFINE_bool('warm_start', False, 'a token starts from the state of the one before')
_SPECULATE = flags.DEFINE_string(
  'speculate', None, 'DRAFT:LOOKAHEAD, such as 4:8: draft 8 tokens with 4 iterations each, verify them together'
)
_PARALLEL = flags.DEFINE_bool('parallel', False, 'decode a wavefront of positions together; --cache is then ring:1')
_STOP = flags.DEFINE_multi_string('stop', [], 'text that ends an answer; may be repeated')
_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'tokens to add at most')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 = greedy')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'draw among the k best tokens; 0 = all')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'draw among the best tokens that together have this probability')
_MIN_P = flags.DEFINE_float('min_p', 0.0, 'draw among tokens with at least this share of the probability of the best')
_PENALTY = flags.DEFINE_float('repetition_penalty', 1.0, 'above 1: tokens seen before become less likely')
_SEED = flags.DEFINE_integer('seed', 0, 'seed of the initial states and of sampling')


def main() -> int:
  from latent_loop.errors import BadInput

  load = program.loader(_WORKDIR.value, _HF.value, _TENSOR.value)
  if [_PROMPT.value is not None, _PROMPTS.value is not None, _CHAT.value].count(True) != 1:
    raise BadInput('give either --prompt=TEXT or --prompts=FILE with one prompt per line, or --chat')
  if '' in _STOP.value:
    raise BadInput('--stop is empty, and every answer would end before it begins; give a text, or leave it out')
  if _CHAT.value:
    return _chat(load)
  asked = _json_lines() if _PROMPTS.value == '-' else [{'prompt': prompt} for prompt in _prompts()]
  from latent_loop import trained

  program.keep_compiled()
  model, tokenizer = load()
  requests = [_request(tokenizer, one, model.config.depth.mean) for one in asked]
  engine = trained.engine_of(model, **_way(min((request.depth for request in requests), default=math.inf)))
  print(f'cache: {engine.bytes_of(requests) / 1e6:.1f} MB', file=sys.stderr)
  if _PROMPTS.value == '-':
    _answer_in_json(tokenizer, engine, asked, requests)
  elif len(requests) == 1:
    _type(tokenizer, engine, asked[0]['prompt'], requests)
  else:
    for one, text in zip(asked, _texts(tokenizer, engine, requests), strict=True):
      print(one['prompt'] + text)
  return 0


def _chat(load) -> int:
  from latent_loop import trained
  from latent_loop.serving import repl

  _standard_input()  # input() reads it
  program.keep_compiled()
  model, tokenizer = load()
  like = _request(tokenizer, {'prompt': ''}, model.config.depth.mean)
  make = lambda tokens: dataclasses.replace(like, tokens=tokens)
  shade = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
  repl.chat(trained.engine_of(model, **_way(like.depth)), tokenizer, make, tuple(_STOP.value), shade)
  return 0


def _prompts() -> list[str]:
  from latent_loop.errors import BadInput

  if _PROMPT.value is not None:
    return [_PROMPT.value]
  path = program.path_of('--prompts', _PROMPTS.value)
  if not path.is_file():
    raise BadInput(f'--prompts={path}: no such file; give a text file with one prompt per line')
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise BadInput(f'--prompts={path}: cannot be read as UTF-8 text ({error}); correct the file') from error
  if not text:
    raise BadInput(f'--prompts={path}: an empty file; the rule is one prompt per line, write one')
  return text.removesuffix('\n').split('\n')  # other characters that end a line, as U+2028, belong to a prompt


def _way(depth: float) -> dict:
  """The engine's options. depth: the least that is asked of it; raises BadInput for a draft that is no shorter."""
  from latent_loop.errors import BadInput
  from latent_loop.inference.speculate import Draft
  from latent_loop.inference.wavefront import Wavefront

  draft = None if _SPECULATE.value is None else Draft.parse(_SPECULATE.value)
  if draft is not None and draft.iterations >= depth:
    raise BadInput(
      f'--speculate={_SPECULATE.value}: a draft of {draft.iterations} iterations saves none of the --depth={depth} of '
      'an answer; draft with fewer, or leave it out'
    )
  return {
    'cache': 'ring:1' if _PARALLEL.value and not _CACHE.present else _CACHE.value,
    'speculate': draft,
    'wavefront': Wavefront() if _PARALLEL.value else None,
  }


def _options() -> dict:
  """What each flag that a JSON line may set is set to."""
  return {
    'depth': _DEPTH.value,
    'exit': _EXIT.value,
    'warm_start': _WARM.value,
    'max_new_tokens': _NEW_TOKENS.value,
    'temperature': _TEMPERATURE.value,
    'top_k': _TOP_K.value,
    'top_p': _TOP_P.value,
    'min_p': _MIN_P.value,
    'repetition_penalty': _PENALTY.value,
    'seed': _SEED.value,
  }


def _standard_input():
  """It, open; what is no UTF-8 in it becomes a sentence further on, as a locale that is not strict has it."""
  from latent_loop.errors import BadInput

  if sys.stdin is None:
    raise BadInput('standard input is closed; pipe something into it, or give --prompt=TEXT')
  sys.stdin.reconfigure(errors='surrogateescape')
  return sys.stdin


def _json_lines() -> list[dict]:
  from latent_loop.errors import BadInput

  out, known = [], {'prompt': '', **_options()}
  for i, line in enumerate(_standard_input(), 1):
    if not line.strip():
      continue
    try:
      one = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise BadInput(f'standard input, line {i}: not JSON ({error}); write {{"prompt": "..."}}') from error
    if not isinstance(one, dict) or not isinstance(one.get('prompt'), str):
      raise BadInput(f'standard input, line {i}: not an object with a text under "prompt"; write {{"prompt": "..."}}')
    for key, value in one.items():
      if key not in known:
        raise BadInput(f'standard input, line {i}: unknown key {key!r}; choose from {", ".join(known)}')
      kinds = (int, float) if isinstance(known[key], float) else (type(known[key]) if key != 'depth' else int,)
      if type(value) not in kinds:
        raise BadInput(f'standard input, line {i}: {key}={value!r} is no {kinds[0].__name__}; correct it')
    out.append(one)
  return out


def _request(tokenizer, one: dict, mean_depth: int):
  from latent_loop.inference.engine import ExitRule
  from latent_loop.inference.text import request_of

  options = _options() | one
  options['depth'] = mean_depth if options['depth'] is None else options['depth']
  options['exit'] = ExitRule.parse(options['exit'])
  return request_of(tokenizer, options.pop('prompt'), **options)


def _texts(tokenizer, engine, requests) -> list[str]:
  from latent_loop.inference.text import text_of

  answers = engine.answer(requests)
  _say_accepted(answers)
  return [text_of(tokenizer, answer, tuple(_STOP.value))[0] for answer in answers]


def _say_accepted(answers) -> None:
  drafts, accepted = sum(answer.drafts for answer in answers), sum(answer.accepted for answer in answers)
  if drafts:
    print(f'accepted {accepted} of {drafts} drafted tokens ({accepted / drafts:.0%})', file=sys.stderr)


def _type(tokenizer, engine, prompt: str, requests) -> None:
  """One answer, as it comes."""
  from latent_loop.inference.text import Typist

  typist = Typist(tokenizer, tuple(_STOP.value))
  print(prompt, end='', flush=True)
  for (answer,) in engine.stream(requests):
    print(''.join(piece for piece, _ in typist.read(answer)), end='', flush=True)
    if typist.finish:
      break
  print(flush=True)
  _say_accepted([answer])


def _answer_in_json(tokenizer, engine, asked, requests) -> None:
  from latent_loop.inference.text import in_json

  for one, answer in zip(asked, engine.answer(requests), strict=True):
    print(json.dumps({'prompt': one['prompt'], **in_json(tokenizer, answer, tuple(_STOP.value))}))


if __name__ == '__main__':
  program.run(main)
