# Everything a newcomer types. Each target works from a fresh clone with Python >= 3.10, a C++ compiler and a package
# index; what is already done is not done again.
#
#   make demo      train a causal video model by Self-Forcing on two CPU cores and show its videos (outputs/demo/)
#   make reproduce compare the ways to train it, with three seeds (about two hours), and write docs/results*.md
#   make test      prove the ops against the reference, and the reference against the published implementation
#   make check     lint, format, types
#   make docs      the documentation, in build/docs/index.html
#   make bench     the benchmarks, side by side with torch
#   make teacher   train the shipped teacher from scratch (a quarter of an hour)
#
# PYTHON=python3.12 chooses the interpreter of the environment that is made in .venv. VENV=/path/to/environment uses an
# environment of yours instead, as it is (with a CUDA torch, for example).
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
unexport PYTHONHOME

.PHONY: build demo reproduce test check format docs bench teacher clean environment

# Prints nothing and does nothing when the environment is up to date.
environment:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh "$(VENV)"

build: environment
	@MAX_JOBS=$(JOBS) python setup.py -q build_ext --inplace

demo: build
	python -m python_ref.demo --config configs/demo.yaml $(DEMO_ARGS)

reproduce: build
	python -m python_ref.reproduce --config configs/reproduce.yaml $(REPRODUCE_ARGS)
	python -m python_ref.data.sample_videos outputs/sample_videos
	python -m python_ref.reproduce --config configs/reproduce_videos.yaml $(REPRODUCE_ARGS)

test: build
	python -m pytest

check: environment
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: environment
	ruff check --fix .
	ruff format .
	clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

docs: environment
	NO_MKDOCS_2_WARNING=1 mkdocs build -q

bench: build
	@for name in attention kv_cache elementwise denoise_loop; do \
		echo "== $$name"; python benchmarks/$$name.py || exit 1; done

teacher: build
	python -m python_ref.train --config configs/teacher.yaml

clean:
	rm -rf build dist outputs *.egg-info selfforcing_ext/*.so
