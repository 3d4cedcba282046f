#!/usr/bin/env bash
# Teach a small CogVideoX a colour that it has never seen, without a GPU and in a few minutes: every step of a real run,
# and pictures of what it learned. `make quickstart` installs what it needs and runs it. Everything lands in
# quickstart-output/, made anew each time.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
echo "A small CogVideoX is taught pink, a colour that it has never seen: four parts, about two minutes on two cores."
OUT=quickstart-output MEASURED_CLIPS=12 AT_LEAST=0.5 exec tiny_model/teach.sh pink
