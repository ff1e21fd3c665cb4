"""Proves what training reads: python -m launch.audit_data --config=experiments/small_text.py

Replays the order of the data, reading no token: every document of every epoch exactly once, for several numbers of
hosts, and for a run that is resumed by more of them; the mixture; tokens lost to packing. Where its weights
change, it replays the steps of the run, not --epochs. With --workdir, instead of --config, it also compares with the
batches that run recorded. Exit code 0 only when all holds.
"""

import os

from absl import flags

from latent_loop.exit_codes import DONE
from launch import program

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run, instead of --config')
_HOSTS = flags.DEFINE_multi_integer('hosts', [1, 2, 4, 8], 'numbers of hosts to replay; repeat for more')
_EPOCHS = flags.DEFINE_integer('epochs', 2, 'how many epochs to replay', lower_bound=1)


def main() -> int:
  from latent_loop.errors import BadInput

  if bool(_WORKDIR.value) == _CONFIG.present:
    both = f'--config and --workdir={_WORKDIR.value}: the run has its own config'
    raise BadInput(f'{both if _WORKDIR.value else "--config and --workdir are missing"}; give one of them')
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from latent_loop import audit, workdir

  folder = program.workdir_of(_WORKDIR.value) if _WORKDIR.value else None
  config = workdir.read_config(folder) if folder else program.sealed(_CONFIG)
  faults = audit.audit(config, _HOSTS.value, _EPOCHS.value, folder, lambda line: print(line, flush=True))
  if faults:
    raise BadInput(f'the data is not read as it should be: {"; ".join(faults[:5])}{" ..." * (len(faults) > 5)}')
  print('ok')
  return DONE


if __name__ == '__main__':
  program.run(main)
