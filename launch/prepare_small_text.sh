#!/usr/bin/env bash
# A corpus for experiments/small_text.py from what a Python machine has: the standard library, installed packages, and
# their documentation. Trains a tokenizer of 4096 tokens; leaves shards in data/small_text. Interrupted, start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment launch/requirements/data.txt

inputs=()
while read -r folder; do
  inputs+=("--input=$folder")
done < <(python - <<'END'
import pathlib, sysconfig

folders = [sysconfig.get_paths()['stdlib'], sysconfig.get_paths()['purelib'], '/usr/lib/python3', '/usr/share/doc']
for folder in dict.fromkeys(folders):
  if pathlib.Path(folder).is_dir():
    print(folder)
END
)

mkdir -p data
if [ ! -f data/small_text_tokenizer/tokenizer.json ]; then
  echo "1 of 2: a tokenizer (data/small_text_tokenizer)"
  python -m launch.train_tokenizer "${inputs[@]}" --vocab_size=4096 --sample_bytes=50000000 \
    --output=data/small_text_tokenizer/tokenizer.json
fi
echo "2 of 2: tokens (data/small_text)"
python -m launch.prepare_data "${inputs[@]}" --tokenizer=data/small_text_tokenizer/tokenizer.json \
  --invalid_utf8=drop --output=data/small_text
echo
echo "Next: python -m launch.train --config=experiments/small_text.py --workdir=runs/small_text"
