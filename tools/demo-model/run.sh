#!/bin/sh
# Both demo models and their card: see models/README.md. Arguments go to make.py (--seed, --steps, ...).
set -e
cd "$(dirname "$0")/../.."
for model in demo-dense demo-moe; do
    python3 tools/demo-model/make.py --model "$model" "$@"
done
