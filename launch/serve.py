"""A trained model behind OpenAI's HTTP routes: python -m launch.serve --workdir=runs/tiny_text --port=8000

POST /v1/completions and /v1/chat/completions (also as streams), GET /v1/models, GET /health, and a chat page at GET /.
Beyond OpenAI's fields a request may set depth, exit, warm_start, top_k, min_p and repetition_penalty, as the flags of
launch.generate do; one that samples and gives no seed gets another answer each time. It may wait in a queue; when that
is full, the answer is 429. SIGTERM and Ctrl-C end it in order.
"""

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_HF = flags.DEFINE_string('hf', None, 'in its place: folder of a Huginn checkpoint in the Hugging Face layout')
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'address to listen at; 0.0.0.0 is all of this machine')
_PORT = flags.DEFINE_integer('port', 8000, 'port to listen at; 0 is any free one')
_SLOTS = flags.DEFINE_integer('slots', 8, 'answers that are made at the same time', 1, 4096)
_QUEUE = flags.DEFINE_integer('queue', 64, 'requests that may wait for a slot', 0, 10**6)
_TENSOR = flags.DEFINE_integer('tensor', 1, 'devices that share each layer, for a model too large for one', 1)
_CACHE = flags.DEFINE_string('cache', 'full', 'full, latest, ring:M or first:M: which depths share keys and values')
_TOTAL = flags.DEFINE_integer('max_total_tokens', 1024, 'of a prompt and its answer', 3, 2**31 - 1)
_DEPTH = flags.DEFINE_integer(
  'max_depth', None, 'the deepest a request may ask; default: twice the mean in training', 1
)


def main() -> int:
  from latent_loop import optional

  load = program.loader(_WORKDIR.value, _HF.value, _TENSOR.value)
  for package in ('starlette', 'uvicorn'):
    optional.load(package, 'server', 'launch.serve')
  from latent_loop import trained
  from latent_loop.inference.board import Board
  from latent_loop.serving import server
  from latent_loop.serving.fields import Limits

  program.keep_compiled()
  listener = server.listen(_HOST.value, _PORT.value)
  model, tokenizer = load()
  config = model.config
  max_depth = 2 * config.depth.mean if _DEPTH.value is None else _DEPTH.value
  board = Board(trained.engine_of(model, _CACHE.value), _SLOTS.value, max_depth, _TOTAL.value)
  limits = Limits(config.name, min(config.depth.mean, max_depth), max_depth, _TOTAL.value)
  host, port = listener.getsockname()[:2]
  ready = (
    f'{config.name}, step {model.step}, at http://{host}:{port} ({_SLOTS.value} slots of {_TOTAL.value} tokens, cache: '
    f'{board.nbytes / 1e6:.1f} MB)'
  )
  server.run(board, tokenizer, limits, _QUEUE.value, listener, lambda: print(ready, flush=True))
  return 0


if __name__ == '__main__':
  program.run(main)
