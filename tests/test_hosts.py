"""Runs of many processes: where each sits, what the launchers would do, and real pairs of processes."""

import concurrent.futures
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from latent_loop import exit_codes, loop, trained
from latent_loop.chaos import kill
from latent_loop.checkpoint import Checkpoints
from latent_loop.errors import BadInput
from latent_loop.model import build
from latent_loop.optim import make_optimizer
from latent_loop.parallel import ports, processes
from latent_loop.parallel.group import Seat, send
from latent_loop.sealing import from_json, write_experiment
from latent_loop.step import make_sharded_state
from launch import hosts
from tests.tiny import leaves_by_path, mesh_of, random_batch, tiny_config, worst_relative

ROOT = Path(__file__).parent.parent
ENV = {
  **os.environ,
  'VENV': 'none',
  'PYTHON': sys.executable,
  'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('--xla_force_host_platform_device_count=8', ''),
}

ALL_CODES = {value for value in vars(exit_codes).values() if isinstance(value, int)}


def bash(*args: str, **more) -> subprocess.CompletedProcess:
  return subprocess.run(['bash', *args], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=600, **more)


# --- launchers as text ---------------------------------------------------------------------------------


def test_local_hosts_dry_run_appends_to_the_xla_flags_of_the_environment():
  result = bash('launch/local_hosts.sh', '--dry_run', '2', '4', '--config=a.py', '--workdir=w')
  assert result.returncode == 0, result.stderr
  start = (
    f"JAX_PLATFORMS=cpu XLA_FLAGS='{ENV['XLA_FLAGS']} --xla_force_host_platform_device_count=4' python -m launch.train "
  )
  assert result.stdout.splitlines() == [
    f'{start}--coordinator=127.0.0.1:PORT --num_processes=2 --process_id={i} --config=a.py --workdir=w &'
    for i in (0, 1)
  ]


def test_tpu_vm_dry_run():
  train = ['--', '--config=experiments/huginn_3p5b.py', '--workdir=/mnt/runs/x']
  create = ['--type=v5p-128', '--runtime=v2-alpha-tpuv5', '--spot']
  result = bash('launch/tpu_vm.sh', '--dry_run', '--name=pod', '--zone=us-east5-a', *create, *train)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  ssh = 'gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a'
  assert lines[:5] == [
    'git ls-files -z -co --exclude-standard | tar czf code.tar.gz --null -T -  # without deleted files',
    'gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-east5-a --accelerator-type=v5p-128 '
    '--runtime-version=v2-alpha-tpuv5 --spot',
    'gcloud compute tpus queued-resources describe pod --zone=us-east5-a --format=value\\(state.state\\)',
    f'{ssh} --worker=0 --command=true',
    'gcloud compute tpus tpu-vm scp code.tar.gz pod: --zone=us-east5-a --worker=all',
  ]
  assert lines[5].startswith(f'{ssh} --worker=all ') and 'ensure_environment launch/requirements/tpu.txt' in lines[5]
  unquoted = [line.replace('\\', '') for line in lines[6:]]
  assert unquoted == [
    f'{ssh} --worker=all --command=cd latent_loop; nohup bash launch/keep_going.sh .venv/bin/python -u -m launch.train '
    '--cluster=tpu --wait_secs=3600 --config=experiments/huginn_3p5b.py --workdir=/mnt/runs/x '
    '>>train.log 2>&1 </dev/null & sleep 1',
    f'{ssh} --worker=0 --command=tail -n 100 -F latent_loop/train.log',
  ]


def fake(folder: Path, **programs: str) -> dict[str, str]:
  """An environment whose path begins with these shell programs; what they write to $CALLS is in folder/calls."""
  folder.mkdir(exist_ok=True)
  for name, text in programs.items():
    (folder / name).write_text(f'#!/usr/bin/env bash\n{text}')
    (folder / name).chmod(0o755)
  return {**ENV, 'PYTHON': '', 'PATH': f'{folder}:{ENV["PATH"]}', 'CALLS': str(folder / 'calls')}


GCLOUD = """
echo "$@" >>"$CALLS"
case "$*" in
  *describe*) echo $STATE; exit ${DESCRIBED:-0} ;;
esac
"""


@pytest.mark.parametrize(
  'state, words',
  [
    ({'STATE': 'FAILED'}, 'the queued resource pod is FAILED and will not come up'),
    ({'STATE': 'SUSPENDED'}, 'the queued resource pod is SUSPENDED and will not come up'),
    ({'STATE': '', 'DESCRIBED': '1', 'SLEPT': '0'}, 'gcloud does not say the state of pod'),
    ({'STATE': 'ACTIVE'}, None),
  ],
)
def test_tpu_vm_packs_and_waits_for_what_can_come(tmp_path, state, words):
  """In a checkout where a file that git tracks is gone."""
  (tmp_path / 'launch').mkdir()
  shutil.copy(ROOT / 'launch/tpu_vm.sh', tmp_path / 'launch')
  (tmp_path / 'gone.py').touch()
  subprocess.run('git init -q && git add . && rm gone.py && touch "a new.py"', shell=True, cwd=tmp_path, check=True)
  env = fake(tmp_path / 'launch/bin', gcloud=GCLOUD, sleep='exit ${SLEPT:-1}') | state
  options = ['--name=pod', '--zone=z', '--type=v5p-8', '--runtime=r', '--', '--x']
  command = ['bash', tmp_path / 'launch/tpu_vm.sh', *options]
  result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
  assert result.returncode == (2 if words else 0) and (words or '') in result.stderr, result.stderr
  assert ('launch.train' in (tmp_path / 'launch/bin/calls').read_text()) == (words is None)
  packed = subprocess.run(['tar', 'tzf', tmp_path / 'code.tar.gz'], capture_output=True, text=True, check=True).stdout
  assert {'a new.py', 'launch/tpu_vm.sh'} <= set(packed.splitlines()) and 'gone.py' not in packed


def test_tpu_vm_starts_every_slice():
  result = bash(
    'launch/tpu_vm.sh', '--dry_run', '--name=pod', '--zone=z', '--slices=2', '--nfs=10.0.0.2:/r', '--', '--x'
  )
  assert result.stdout.count('launch.train') == 2 and ' pod-0 ' in result.stdout and ' pod-1 ' in result.stdout
  assert result.stdout.count('mount -t nfs 10.0.0.2:/r /mnt/runs') == 2 and 'create' not in result.stdout


def test_slurm_dry_run():
  result = bash('launch/slurm.sh', '--dry_run', '--config=experiments/huginn_1b.py', '--workdir=runs/x')
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == [
    "bash -c 'source launch/env.sh; ensure_environment launch/requirements/cuda.txt'",
    'srun --label --wait=60 bash launch/slurm_task.sh slurm-JOB.final python -u -m launch.train --cluster=slurm '
    '--wait_secs=3600 --config=experiments/huginn_1b.py --workdir=runs/x',
    'scontrol requeue $SLURM_JOB_ID  # after exit code 10, 12 or 14',
  ]


@pytest.mark.parametrize('job_minutes, limits', [(90, (84, 85)), (5, (1,)), (3, (1,))])
def test_slurm_gives_the_end_of_the_job_as_a_time_limit(job_minutes, limits):
  """Five minutes ahead, where the job has them."""
  ends = {**ENV, 'SLURM_JOB_END_TIME': str(int(time.time()) + job_minutes * 60)}
  command = ['bash', 'launch/slurm.sh', '--dry_run', '--config=a.py']
  result = subprocess.run(command, cwd=ROOT, env=ends, capture_output=True, text=True)
  minutes = int(re.search(r'--cluster=slurm --wait_secs=3600 --time_limit=(\S+) --config=a.py', result.stdout).group(1))
  assert minutes in limits


SRUN = """
shift 2  # its own options
highest=0
for code in $CODES; do
  code=$code "$@" || { ended=$?; highest=$((ended > highest ? ended : highest)); }
done
exit $highest
"""


def slurm_job(folder: Path, codes: str) -> tuple[int, bool, str]:
  """A job whose tasks end with `codes`: (its exit code, whether it queued itself again, what it said)."""
  if not (folder / 'launch').exists():
    (folder / 'launch').mkdir()
    for name in ('env.sh', 'slurm_task.sh'):
      shutil.copy(ROOT / 'launch' / name, folder / 'launch')
  calls = folder / 'bin' / 'calls'
  calls.unlink(missing_ok=True)
  env = fake(folder / 'bin', srun=SRUN, scontrol='echo "$@" >>"$CALLS"', python='exit "$code"')
  env |= {'SLURM_JOB_ID': '7', 'SLURM_SUBMIT_DIR': str(folder), 'SLURM_RESTART_COUNT': '9', 'CODES': codes}
  result = subprocess.run(['bash', ROOT / 'launch/slurm.sh', '--x'], env=env, capture_output=True, text=True)
  assert not calls.exists() or calls.read_text() == 'requeue 7\n'
  return result.returncode, calls.exists(), result.stderr


@pytest.mark.parametrize('code', sorted(ALL_CODES))
def test_a_slurm_job_starts_again_after_the_codes_that_a_wrapper_resumes_on(tmp_path, code):
  """A final code counts where all others lost the task that ended so: 14 is the highest, which srun says."""
  final = code not in (exit_codes.DONE, *exit_codes.RESUME)
  ended, again, said = slurm_job(tmp_path, f'14 {code} 14' if final else f'{code} {code}')
  assert (ended, again) == (code, code in exit_codes.RESUME)
  assert (f'error: a task ended with exit code {code}' in said) == final
  assert [path.name for path in tmp_path.glob('slurm-*')] == (['slurm-7.failures'] if code in (12, 14) else [])


def test_a_slurm_job_gives_up_on_failures_in_a_row_alone(tmp_path):
  for codes in ('14', '12', '14', '14', '14', '10 10', '14', '12', '14', '137', '14'):
    assert slurm_job(tmp_path, codes)[1]
  ended, again, said = slurm_job(tmp_path, '14')
  assert (ended, again) == (14, False) and 'error: exit code 14, the sixth such end in a row' in said


def test_a_slurm_task_passes_signals_on(tmp_path):
  """Some clusters signal the shell alone."""
  (tmp_path / 'codes').write_text('wait')
  command = [sys.executable, '-ISc', FAKE, str(tmp_path / 'codes')]
  command = ['bash', 'launch/slurm_task.sh', str(tmp_path / 'final'), *command]
  with subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True) as task:
    next(line for line in task.stdout if 'waiting' in line)
    task.send_signal(signal.SIGTERM)
    assert task.wait(30) == 10 and not (tmp_path / 'final').exists()


GKE = '--name=pod --image=i:1 --accelerator=tpu-v5p-slice --topology=4x4x4 --hosts=16 --chips=4 --claim=r'.split()


def test_gke_starts_again_after_the_codes_that_a_wrapper_resumes_on():
  manifest = bash('launch/gke/jobset.sh', '--dry_run', *GKE, '--', '--x').stdout
  final = {int(code) for code in re.search(r'values: \[(.*)\]', manifest).group(1).split(',')}
  assert final == ALL_CODES - {exit_codes.DONE} - set(exit_codes.RESUME)


KUBECTL = """
echo "$@" >>"$CALLS"
[ "$1" != get ] || echo -n "$STATE"
[ "$1" != apply ] || cat >/dev/null
"""


@pytest.mark.parametrize(
  'state, calls',
  [
    ('', ['get', 'apply']),
    ('JobSet Failed', ['get', 'delete', 'apply']),
    ('JobSet Completed', ['get', 'delete', 'apply']),
    ('JobSet ', ['get']),
  ],
)
def test_gke_replaces_a_jobset_that_has_ended_and_refuses_one_that_runs(tmp_path, state, calls):
  env = fake(tmp_path, kubectl=KUBECTL) | {'STATE': state}
  command = ['bash', 'launch/gke/jobset.sh', *GKE, '--', '--x']
  result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert [line.split()[0] for line in (tmp_path / 'calls').read_text().splitlines()] == calls
  runs = calls == ['get']
  assert result.returncode == (2 if runs else 0) and ('error: a JobSet pod is there' in result.stderr) == runs


FAKE = """
import pathlib, signal, os, sys, time
codes = pathlib.Path(sys.argv[1])
code, *rest = codes.read_text().split()
codes.write_text(' '.join(rest))
print('ran', flush=True)
if code == 'wait':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(10))
  print('waiting', flush=True)
  time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL) if code == 'killed' else sys.exit(int(code))
"""


def keep_going(folder: Path, codes: str, **settings) -> subprocess.Popen:
  (folder / 'codes').write_text(codes)
  command = ['bash', 'launch/keep_going.sh', sys.executable, '-ISc', FAKE, str(folder / 'codes')]
  env = {**ENV, 'PAUSE': '0', **settings}
  return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
  'codes, runs, last',
  [(f'10 12 14 killed {code} 7', 5, code) for code in sorted(ALL_CODES - set(exit_codes.RESUME))],
)
def test_keep_going_resumes_on_10_12_14_and_signals_and_stops_on_the_rest(tmp_path, codes, runs, last):
  process = keep_going(tmp_path, codes)
  out, _ = process.communicate(timeout=30)
  assert (out.count('ran'), process.returncode) == (runs, last)


def test_keep_going_gives_up_on_a_run_that_makes_no_headway(tmp_path):
  process = keep_going(tmp_path, '14 14 14 14', TRIES='3')
  out, error = process.communicate(timeout=30)
  assert (out.count('ran'), process.returncode) == (3, 14) and 'short try number 3 in a row' in error


def test_keep_going_passes_a_signal_on_and_does_not_start_again(tmp_path):
  process = keep_going(tmp_path, 'wait 0')
  for line in process.stdout:
    if 'waiting' in line:
      break
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 10 and 'ran' not in out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_keep_going_ends_at_once_when_asked_in_the_pause(tmp_path, number):
  process = keep_going(tmp_path, '14 0', PAUSE='20')
  next(line for line in process.stderr if 'the same command again' in line)
  process.send_signal(number)
  out, _ = process.communicate(timeout=10)
  assert (out.count('ran'), process.returncode) == (1, 14)


def test_exit_codes_are_those_of_the_documented_table():
  rows = re.findall(r'^\| (\d+) \|', (ROOT / 'launch/README.md').read_text(), flags=re.MULTILINE)
  assert [int(row) for row in rows] == sorted(ALL_CODES)


def test_the_image_holds_nothing_that_git_leaves_out():
  """Neither runs nor data nor an environment, which COPY would take."""
  left_out, ignored = ((ROOT / name).read_text().split() for name in ('.gitignore', '.dockerignore'))
  assert {'.git', *(line.strip('/') for line in left_out)} <= {line.removeprefix('**/') for line in ignored}


def test_gke_dry_run():
  options = ['--name=pod', '--image=i:1', '--accelerator=tpu-v5p-slice', '--topology=4x4x4', '--hosts=16', '--chips=4']
  train = ['--', '--config=experiments/huginn_3p5b.py', "--config.name=it's"]
  result = bash('launch/gke/jobset.sh', '--dry_run', *options, '--claim=runs', '--slices=2', *train)
  assert result.returncode == 0, result.stderr
  manifest = result.stdout
  assert '@' not in manifest, 'a place was left unfilled'
  for line in (
    'name: pod',
    'replicas: 2',
    'parallelism: 16',
    'completions: 16',
    'gke-tpu-accelerator: tpu-v5p-slice',
    'gke-tpu-topology: 4x4x4',
    'image: i:1',
    "launch.train, --cluster=tpu, --wait_secs=3600, '--config=experiments/huginn_3p5b.py', '--config.name=it''s'] #",
    'google.com/tpu: 4',
    'claimName: runs',
  ):
    assert line in manifest, line
  assert manifest.splitlines()[-1] == 'kubectl apply -f - # with the manifest above'
  without = bash('launch/gke/jobset.sh', '--dry_run', *options, '--slices=2', *train).stdout
  volumes = manifest[manifest.index('                  volumeMounts:') : manifest.index('kubectl')]
  assert manifest.replace(volumes, '') == without and 'claimName: runs' in volumes


@pytest.mark.parametrize(
  'args,words',
  [
    (['launch/local_hosts.sh', '2', '--config=a.py'], 'write: bash launch/local_hosts.sh 2 4'),
    (['launch/tpu_vm.sh', '--dry_run', '--name=pod', '--', '--x'], '--name, --zone'),
    (['launch/tpu_vm.sh', '--config=a.py'], 'behind --'),
    (['launch/slurm.sh', '--config=a.py'], 'write: sbatch'),
    (['launch/gke/jobset.sh', '--name=pod', '--', '--x'], '--image and'),
  ],
)
def test_a_launcher_refuses_in_words(args, words):
  result = bash(*args)
  assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1


# --- where a process sits ------------------------------------------------------------------------------


def seat(environment: dict, *args: str):
  flags.FLAGS.unparse_flags()
  flags.FLAGS(['train', *args])
  try:
    there = hosts.seat_of(environment)
    return there and (there.coordinator, there.num_processes, there.process_id)
  finally:
    flags.FLAGS.unparse_flags()
    for name in ('cluster', 'coordinator', 'num_processes', 'process_id'):
      flags.FLAGS[name].unparse()


SLURM = {'SLURM_JOB_ID': '4097', 'SLURM_NTASKS': '3', 'SLURM_STEP_NUM_NODES': '3', 'SLURM_PROCID': '2'}


@pytest.mark.parametrize(
  'nodes,first',
  [('node7', 'node7'), ('a,b', 'a'), ('node[007-009,012]', 'node007'), ('n[3,5],m1', 'n3'), ('n[1-2]-ib,m', 'n1-ib')],
)
def test_slurm_names_the_first_node(nodes, first):
  assert seat({**SLURM, 'SLURM_STEP_NODELIST': nodes}, '--cluster=slurm') == (f'{first}:61441', 3, 2)


def test_gke_names_worker_and_slice():
  environment = {'TPU_WORKER_HOSTNAMES': 'a-0,a-1', 'TPU_WORKER_ID': '1'}
  assert seat(environment, '--cluster=tpu') == ('a-0:8482', 2, 1)
  slices = {'MEGASCALE_COORDINATOR_ADDRESS': 'z:8080', 'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1'}
  assert seat({**environment, **slices}, '--cluster=tpu') == ('z:8482', 4, 3)


def test_a_tpu_vm_asks_its_metadata_server():
  pages = {
    'worker-network-endpoints': 'unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6',
    'agent-worker-number': '1',
    'tpu-env': "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n",
  }

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers['Metadata-Flavor'] == 'Google'
      self.send_response(200)
      self.end_headers()
      self.wfile.write(pages[self.path.rpartition('/')[2]].encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}'}
    assert seat(environment, '--cluster=tpu') == ('10.0.0.1:8482', 4, 3)
    server.shutdown()


def test_flags_name_a_seat_and_a_laptop_needs_none():
  assert seat({}, '--coordinator=h:1', '--num_processes=2', '--process_id=1') == ('h:1', 2, 1)
  assert seat({}) is None


@pytest.mark.parametrize(
  'environment,args,words',
  [
    ({}, ['--coordinator=h:1', '--num_processes=2'], 'give --process_id'),
    ({}, ['--coordinator=h', '--num_processes=2', '--process_id=0'], 'not HOST:PORT'),
    ({}, ['--coordinator=h:1', '--num_processes=2', '--process_id=2'], 'ids count from 0 to 1'),
    ({}, ['--coordinator=h:1', '--num_processes=2', '--process_id=1', '--cluster=tpu'], 'drop --cluster'),
    ({}, ['--cluster=slurm'], 'srun did not start this'),
    ({**SLURM, 'SLURM_STEP_NODELIST': 'a', 'SLURM_STEP_NUM_NODES': '1'}, ['--cluster=slurm'], '--ntasks-per-node=1'),
    ({'GCE_METADATA_IP': '127.0.0.1:9'}, ['--cluster=tpu'], 'this is no TPU VM'),
    ({**SLURM, 'SLURM_STEP_NODELIST': 'a'}, [], '--cluster=slurm is missing'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, [], '--cluster=tpu is missing'),
  ],
)
def test_a_seat_that_makes_no_sense_is_a_sentence(environment, args, words):
  with pytest.raises(BadInput, match=words):
    seat(environment, *args)


def test_a_free_port_is_not_taken_and_none_that_a_connection_is_given_meanwhile(monkeypatch):
  assert {20_000 <= ports.free_port() < 30_000 for _ in range(9)} == {True}
  with ports.listen(0) as one, ports.listen(0) as other:
    taken, free = one.getsockname()[1], other.getsockname()[1]
    other.close()
    monkeypatch.setattr(ports.random.SystemRandom, 'sample', lambda self, numbers, count: [taken, free])
    assert ports.free_port() == free
    monkeypatch.setattr(ports.random.SystemRandom, 'sample', lambda self, numbers, count: [taken])
    with pytest.raises(BadInput, match='no free port'):
      ports.free_port()


# --- real processes ------------------------------------------------------------------------------------


def small_config(**overrides):
  """A run that is small in everything, float32, AdamW without clipping."""
  return tiny_config(
    **{
      'name': 'small_run',
      'model.vocab_size': 264,
      'depth.mean': 2,
      'depth.backprop_depth': 1,
      'data.source': 'addition',
      'data.seq_len': 40,
      'data.max_difficulty': 3,
      'optim.clip_norm': None,
      'train.num_steps': 5,
      'train.loss_chunk': 20,
      'checkpoint.every_steps': 1,
      'checkpoint.keep_last': 9,
      'eval.num_batches': 1,
      'eval.sample_tokens': 0,
      'log.every_steps': 1,
      **overrides,
    }
  )


def small_run(folder: Path, **overrides) -> Path:
  """An experiment file of small_config."""
  return write_experiment(small_config(**overrides), folder / 'small_run.py')


def metrics(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def first_gradients(workdir: Path) -> dict[str, np.ndarray]:
  """AdamW's first moment after step 1 is (1 - b1) times the gradient: every array of it, by path."""
  config = from_json((workdir / 'config.json').read_text(), '')
  init, specs = make_sharded_state(
    config, build(config.model, config.depth), make_optimizer(config.optim, config.train.num_steps), mesh_of()
  )
  with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
    state = checkpoints.restore(1, jax.eval_shape(init), specs, fingerprint=None)
  moments = {path: x for path, x in leaves_by_path(state.opt_state).items() if '/mu/' in f'/{path}'}
  assert moments
  return moments


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  """2 processes x 4 devices against 1 x 8, float32: losses, every gradient, and each file written once."""
  experiment, mesh = (
    small_run(tmp_path, **{'eval.sample_tokens': 2}),
    ['--config.mesh.fsdp=2', '--config.mesh.tensor=2'],
  )
  result = bash('launch/local_hosts.sh', '2', '4', f'--config={experiment}', f'--workdir={tmp_path}/two', *mesh)
  assert result.returncode == 0, result.stdout + result.stderr
  assert '[0] preflight: 2 of 2 processes, alike; 8 devices of 2 x 4 (cpu)' in result.stdout
  assert result.stdout.count('step 5/5') == 1 and result.stdout.count('wrote ') == 1
  config = from_json((tmp_path / 'two/config.json').read_text(), '')
  assert loop.run(config, tmp_path / 'one') == exit_codes.DONE
  assert {p.name for p in (tmp_path / 'two').iterdir()} == {p.name for p in (tmp_path / 'one').iterdir()}
  one, two = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
  assert [r['step'] for r in two] == [1, 2, 3, 4, 5]
  assert [r['batch_hash'] for r in two] == [r['batch_hash'] for r in one], 'of the global batch, whoever builds it'
  np.testing.assert_allclose(two[0]['loss'], one[0]['loss'], rtol=1e-6)
  np.testing.assert_allclose([r['loss'] for r in two], [r['loss'] for r in one], rtol=1e-5)
  error, worst = worst_relative(first_gradients(tmp_path / 'two'), first_gradients(tmp_path / 'one'))
  assert error < 1e-5, (error, worst)


class Pair:
  """A launcher of two processes under way; the context ends what is left of them."""

  def __init__(self, folder: Path, *args: str):
    command = ['bash', 'launch/local_hosts.sh', '2', '1', f'--config={small_run(folder)}', f'--workdir={folder}/run']
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    self.launcher = subprocess.Popen([*command, *args], cwd=ROOT, env=ENV, **options)
    self._seen = ''

  def __enter__(self) -> 'Pair':
    return self

  def __exit__(self, *exception: object) -> None:
    if self.launcher.poll() is None:
      self.signal(0, signal.SIGKILL)
      self.launcher.communicate(timeout=200)

  def wait_for(self, words: str) -> None:
    for line in self.launcher.stdout:
      self._seen += line
      if words in line:
        return
    pytest.fail(f'{words!r} did not come: {self._seen}')

  def signal(self, process: int, number: int) -> None:
    os.kill(int(re.search(rf'^process {process} has pid (\d+)$', self._seen, re.MULTILINE).group(1)), number)

  def rest(self) -> str:
    return self.launcher.communicate(timeout=200)[0]


LONG = ('--config.train.num_steps=100000', '--config.checkpoint.every_steps=100000')


@pytest.mark.slow
def test_killing_one_of_two_ends_the_other_with_14_in_seconds(tmp_path, victim=0):
  """The one that holds the coordinator; below, others of three."""
  with Pair(tmp_path, *LONG) as pair:
    pair.wait_for('step 3/')
    pair.signal(victim, signal.SIGKILL)
    start = time.monotonic()
    rest = pair.rest()
  assert time.monotonic() - start < 30, 'seconds, also on a machine with other work'
  assert pair.launcher.returncode == 14, rest
  assert f'process {1 - victim} ended with exit code 14' in rest
  assert f'process {victim} of 2 was lost' in rest and 'Traceback' not in rest


@pytest.mark.slow
def test_stopping_one_of_two_ends_the_job_with_12_and_stacks(tmp_path):
  """SIGSTOP: the other one waits in a collective, or for a word. Its watchdog ends it, the launcher the stopped one."""
  with Pair(tmp_path, *LONG, '--config.guard.patience_secs=4') as pair:
    pair.wait_for('step 20/')
    pair.signal(0, signal.SIGSTOP)
    start = time.monotonic()
    rest = pair.rest()
  assert time.monotonic() - start < 40, 'seconds after the patience, also on a machine with other work'
  assert pair.launcher.returncode == 12, rest
  assert 'process 1 ended with exit code 12' in rest
  assert 'nothing has moved for' in rest and 'this process is in phase' in rest
  assert 'most recent call first' in rest and 'loop.py' in rest, 'the stacks'


@pytest.mark.slow
@pytest.mark.parametrize('process, number', [(1, signal.SIGTERM), (0, signal.SIGUSR1)])
def test_a_signal_to_one_process_stops_both_at_one_saved_step(tmp_path, process, number):
  """And, for one of the signals: that pair, started again, and a pair that nobody stopped end alike, to the byte."""
  steps = ('--config.train.num_steps=36', '--config.checkpoint.every_steps=36', '--config.checkpoint.keep_last=1')
  with Pair(tmp_path, *steps) as pair:
    pair.wait_for('step 3/')
    pair.signal(process, number)
    rest = pair.rest()
  assert pair.launcher.returncode == 10, rest
  assert rest.count('ended with exit code 10') == 2 and rest.count('start the same command again') == 1
  saved = int(next((tmp_path / 'run' / 'checkpoints').iterdir()).name)
  assert f'stopped at step {saved}, saved' in rest and metrics(tmp_path / 'run')[-1]['step'] == saved < 36
  if number == signal.SIGTERM:
    for name in ('run', 'whole'):
      where = (f'--config={small_run(tmp_path)}', f'--workdir={tmp_path}/{name}')
      result = bash('launch/local_hosts.sh', '2', '1', *where, *steps)
      assert result.returncode == 0, result.stdout + result.stderr
      assert (f'continuing at step {saved} of 36' in result.stdout) == (name == 'run')
    assert kill.differences(tmp_path / 'whole', tmp_path / 'run') == []


def train(process: int, port: int, *args: str) -> subprocess.Popen:
  place = [f'--coordinator=127.0.0.1:{port}', f'--process_id={process}', '--workdir=never_made', '--wait_secs=10']
  command = [sys.executable, '-m', 'launch.train', '--config=experiments/tiny_task.py', *place, *args]
  return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def meet(port: int, process: int) -> socket.socket:
  link = processes._connect(Seat(f'127.0.0.1:{port}', 3, process), time.monotonic() + 20, 20)
  send([link], {'process_id': process, 'facts': {}})
  return link


def test_a_process_that_died_while_waiting_may_come_again():
  with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as open_links:
    port = ports.free_port()
    met = pool.submit(processes._gather, Seat(f'127.0.0.1:{port}', 3, 0), {}, 20)
    meet(port, 1).close()
    came = [open_links.enter_context(meet(port, process)) for process in (1, 2)]
    links = [open_links.enter_context(met.result()[process]) for process in (1, 2)]
    assert [link.getpeername()[1] for link in links] == [link.getsockname()[1] for link in came]


def test_two_processes_of_one_number_are_refused():
  with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as open_links:
    port = ports.free_port()
    met = pool.submit(processes._gather, Seat(f'127.0.0.1:{port}', 3, 0), {}, 20)
    for _ in range(2):
      open_links.enter_context(meet(port, 1))
    with pytest.raises(BadInput, match='two processes have --process_id=1'):
      met.result()


@pytest.mark.slow
def test_what_cannot_work_ends_with_2_and_one_sentence_everywhere():
  """One process fewer than expected; configs that differ; no process 0. All at once, for the time."""
  a, b, c = (ports.free_port() for _ in range(3))
  fewer = [train(i, a, '--num_processes=3') for i in (0, 2)]
  differ = [train(i, b, '--num_processes=2', f'--config.seed={i}') for i in (0, 1)]
  alone = [train(1, c, '--num_processes=2')]
  for group, words in (
    (fewer, f'2 of 3 processes arrived at 127.0.0.1:{a} within 10 s; missing: process 1;'),
    (differ, 'the processes are not alike: config.seed is 0 on process 0 and 1 on process 1;'),
    (alone, f'--coordinator=127.0.0.1:{c}: process 0 was not reached within 10 s'),
  ):
    for process in group:
      _, error = process.communicate(timeout=120)
      assert process.returncode == 2 and words in error, error
      assert error.startswith('error: ') and len(error.splitlines()) == 1
  assert not (ROOT / 'never_made').exists()


# --- rows ----------------------------------------------------------------------------------------------


def test_rows_come_back_in_order():
  mesh, batch = mesh_of(data=2, fsdp=2, tensor=2), random_batch()
  assert trained.rows_here(8, mesh) == list(range(8))
  placed = trained.place(batch, mesh)
  assert np.array_equal(np.asarray(placed.tokens_BT), batch.tokens_BT)


INTERLEAVED = """
import sys, jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from latent_loop import trained
from latent_loop.batch import Batch
from latent_loop.parallel import processes
from latent_loop.parallel.group import Seat
me, port = int(sys.argv[1]), sys.argv[2]
group = processes.join(Seat(f'127.0.0.1:{port}', 2, me), {}, 200)
processes.check_devices()
whole = np.arange(24).reshape(8, 3)
for order, shape, count in (((0, 2, 1, 3), (2, 2, 1), 4), ((0, 2, 1, 3), (2, 1, 2), 8), ((3, 2, 0, 1), (4, 1, 1), 4)):
  devices = np.asarray(jax.devices())[list(order)].reshape(1, *shape)
  mesh = Mesh(devices, ('dcn', 'data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 4)
  mine = trained.rows_here(8, mesh)
  assert len(mine) == count, (mine, order, shape)
  placed = trained.place(Batch(*[whole[mine]] * 5), mesh).tokens_BT
  everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(placed)
  assert np.array_equal(np.asarray(everywhere), whole), (order, shape)
group.leave(0)
print('rows in order')
"""


@pytest.mark.slow
def test_rows_are_in_order_when_the_mesh_interleaves_processes():
  env = {**ENV, 'XLA_FLAGS': f'{ENV["XLA_FLAGS"]} --xla_force_host_platform_device_count=2'}
  command, port = [sys.executable, '-c', INTERLEAVED], str(ports.free_port())
  pair = [subprocess.Popen([*command, str(i), port], cwd=ROOT, env=env, stdout=subprocess.PIPE) for i in (0, 1)]
  for process in pair:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and b'rows in order' in out


ENDING = """
import os, signal, sys, time
from latent_loop.parallel import processes
from latent_loop.parallel.group import Seat
me, port, ends, how = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
group = processes.join(Seat(f'127.0.0.1:{port}', 3, me), {}, 200)
group.agree(False)
if me == ends and how == 137:
  os.kill(os.getpid(), signal.SIGKILL)
if me == ends:
  group.leave(how)
  os._exit(how)
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize('ends,how,others', [(0, 2, 2), (2, 1, 14), (0, 137, 14), (2, 137, 14)])
def test_the_end_of_one_of_three_reaches_the_two_others(ends, how, others):
  """Also those that hold no connection to it, and from a main thread that would never come back."""
  command, port = [sys.executable, '-c', ENDING], str(ports.free_port())
  options = {'cwd': ROOT, 'env': ENV, 'stderr': subprocess.PIPE, 'text': True}
  three = [subprocess.Popen([*command, str(i), port, str(ends), str(how)], **options) for i in range(3)]
  what = 'was lost (killed, or its machine is gone)' if how == 137 else f'ended with exit code {how}'
  for i, process in enumerate(three):
    _, error = process.communicate(timeout=200)
    assert process.returncode == (others if i != ends else -9 if how == 137 else how), error
    assert i == ends or f'error: process {ends} of 3 {what}, so process {i} ends too' in error
