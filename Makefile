# The front desk: everything a person types, over the CMake presets. `make help` lists it.
PRESET   ?= $(if $(SAN),$(SAN),release)
BUILD    := build/$(PRESET)
JOBS     ?= $(shell nproc)
MODEL    ?= demo-dense
PREFIX   ?= /usr/local
FUZZ_SECONDS ?= 60

.PHONY: all demo test test-full bench gpu-test gpu-sanitize gpu-bench fuzz install clean help deps deps-test format

all: deps $(BUILD)/build.ninja
	cmake --build $(BUILD) -j $(JOBS)

help:
	@echo 'make                    build into build/release'
	@echo 'make demo               build, serve a small model, chat with it (MODEL=demo-dense|demo-moe|a folder)'
	@echo 'make test               build and run every quick test; SAN=asan|ubsan|tsan runs them under a sanitizer'
	@echo 'make test-full          the long tests as well (goldens of the full shapes)'
	@echo 'make bench              limits, kernels, steps and server load on this machine, into bench/results.csv'
	@echo 'make gpu-test           the checks of the cuda backend, from a built tree on a machine with a GPU'
	@echo 'make gpu-sanitize       its kernels under the memory, race and barrier checkers of the CUDA toolkit'
	@echo 'make gpu-bench          the table of what it must reach, three runs; GPU_BENCH=--all runs 21b-a3b as well (45 GB of disk)'
	@echo 'make fuzz               every fuzz target for FUZZ_SECONDS (60) each'
	@echo 'make install            ernest, its man page and completion below PREFIX (/usr/local) and DESTDIR'
	@echo 'make format             clang-format over src and tests'
	@echo 'make clean              remove build/'
	@echo 'Debian packages that are missing are named and installed first; nothing is touched when all are there.'

deps:
	@tools/deps.sh build

deps-test:
	@tools/deps.sh build test

build/%/build.ninja: CMakeLists.txt CMakePresets.json
	cmake --preset $*

demo: all
	@tools/demo.sh $(BUILD)/ernest $(MODEL)

# Configured anew each time: a tool that was installed since the last time brings its tests with it.
test: deps-test
	cmake --preset $(PRESET) -DERN_TESTS=ON >/dev/null
	cmake --build $(BUILD) -j $(JOBS)
	cd $(BUILD) && ctest --output-on-failure -j $(JOBS) -LE long

test-full: deps-test
	cmake --preset $(PRESET) -DERN_TESTS=ON >/dev/null
	cmake --build $(BUILD) -j $(JOBS)
	cd $(BUILD) && ERNEST_TEST_FULL=1 ctest --output-on-failure -j 1

bench: all
	@tools/bench.sh $(BUILD)

# These two build nothing: a machine with a GPU need not have a compiler.
gpu-test:
	@tools/gpu_test.sh $(BUILD)

gpu-sanitize:
	@tools/gpu_sanitize.sh $(BUILD)

gpu-bench:
	@tools/gpu_bench.sh $(BUILD) $(GPU_BENCH)

fuzz: deps-test build/fuzz/build.ninja
	cmake --build build/fuzz -j $(JOBS)
	@tools/fuzz.sh build/fuzz $(FUZZ_SECONDS) $(JOBS)

install: all
	DESTDIR='$(DESTDIR)' cmake --install $(BUILD) --prefix $(PREFIX)
	install -d '$(DESTDIR)$(PREFIX)/share/man/man1' '$(DESTDIR)$(PREFIX)/share/bash-completion/completions'
	$(BUILD)/ernest docs man > '$(DESTDIR)$(PREFIX)/share/man/man1/ernest.1'
	$(BUILD)/ernest docs completion > '$(DESTDIR)$(PREFIX)/share/bash-completion/completions/ernest'

format:
	clang-format -i $$(git ls-files 'src/*.[ch]' 'src/*.cc' 'src/*.cu' 'src/*.cuh' 'tests/*.[ch]' 'bench/*.[ch]' 'tools/*.[ch]')

clean:
	rm -rf build
