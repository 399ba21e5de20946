# make demo   see it work: a web server in a VM, from a docker-save tar
# make test   everything CI runs: unit tests with the race detector, the
#             hypervisor's conformance suite, end to end in real VMs
# Both install what they need first (hack/setup), as root or with sudo.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E env "PATH=$$PATH")
HOSTS   := linux/amd64 linux/arm64 darwin/amd64 darwin/arm64
ARCH    := $(shell go env GOARCH)
LDFLAGS := -s -w -X github.com/cri-vz/cri-vz/cmd/cri-vz/command.Version=$(VERSION)
CRITEST_PARALLEL ?= 1
CRITEST_REGISTRY ?=
AGENT_LDFLAGS := -s -w -X github.com/cri-vz/cri-vz/guest/agent.Version=$(VERSION)
export CGO_ENABLED := 0

# What a Mac runs.
DARWIN_PACKAGES := ./cmd/cri-vz/... ./cri/... ./sandbox/... ./imageservice/... ./guest/api/... ./guest/image/...
# What CI asks of the whole daemon as on a Mac; make test-long asks the rest, too.
MAC_TESTS       := ^Test(Image|Container|Log|Mounts|Exec|ExecSync|Attach|PortForward|Stats|PodSandbox|Restart|MacNetwork|MacHostPorts)$$
STAND_IN        := test/fakevz=github.com/Code-Hex/vz/v3

# Packages whose tests boot VMs run one at a time: a boot takes a whole core. The race
# detector looks at those that run the project's code in their own process; the other
# ones are clients of programs.
VM_RACED    := ./guest/image ./sandbox/qemu ./test/guest ./sandbox
VM_PACKAGES := $(VM_RACED) ./test/e2e ./test/conformance
UNIT_PACKAGES = $(filter-out $(VM_PACKAGES:.%=github.com/cri-vz/cri-vz%) %/test/node,$(shell go list ./... | grep -v /hack/))

.PHONY: build agent guest setup demo check lint test test-unit test-vm test-node test-long critest bench kernel clean

# The Virtualization framework takes cgo, and a signature with an entitlement; one
# that nobody vouches for will do on the Mac that made it.
build: ## bin/cri-vz
ifeq ($(shell uname -s),Darwin)
	CGO_ENABLED=1 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/cri-vz ./cmd/cri-vz
	codesign --force --sign - --entitlements hack/vz.entitlements bin/cri-vz
else
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/cri-vz ./cmd/cri-vz
endif

agent: ## the guest agent for both architectures, at most 6 MiB each
	for arch in amd64 arm64; do \
	  GOOS=linux GOARCH=$$arch go build -trimpath -ldflags '$(AGENT_LDFLAGS)' -o bin/cri-vz-agent-$$arch ./cmd/cri-vz-agent; \
	  size=$$(stat -c %s bin/cri-vz-agent-$$arch 2>/dev/null || stat -f %z bin/cri-vz-agent-$$arch); \
	  [ "$$size" -le $$((6 * 1024 * 1024)) ] || { echo "bin/cri-vz-agent-$$arch has $$size bytes, more than 6 MiB" >&2; exit 1; }; \
	done

guest: build agent ## kernel and initramfs of the VMs, in the user's cache
	for arch in amd64 arm64; do bin/cri-vz guest build --arch $$arch --agent bin/cri-vz-agent-$$arch; done

setup: ## install what building and testing needs; safe to repeat
	$(SUDO) hack/setup

demo: setup guest ## run an image from a docker-save tar in a VM, look at it, clean up
	$(SUDO) hack/real-root hack/demo

check: lint ## format, vet, lint, tidy, and builds and type checks for every host
	@fmt=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$fmt" ] || { echo "not gofmt'ed: $$fmt" >&2; exit 1; }
	go mod tidy -diff
	for host in $(HOSTS); do \
	  case $$host in linux/*) packages=./... ;; *) packages='$(DARWIN_PACKAGES)' ;; esac; \
	  echo "build and vet for $$host"; \
	  GOOS=$${host%/*} GOARCH=$${host#*/} go build -o /dev/null ./cmd/cri-vz; \
	  GOOS=$${host%/*} GOARCH=$${host#*/} go vet $$packages; \
	done
	go run ./hack/typecheck -same $(STAND_IN) $(DARWIN_PACKAGES)
	hack/with-fakevz go vet ./sandbox/... $(word 2,$(subst =, ,$(STAND_IN)))

lint:
	hack/lint

test: setup guest test-unit test-vm ## what CI runs

# What lies in hack has one thread, and takes five times as long with the race detector.
test-unit:
	$(SUDO) hack/real-root env CGO_ENABLED=1 go test -race -timeout 10m $(UNIT_PACKAGES)
	go test ./hack/...

test-vm:
	$(SUDO) hack/real-root hack/with-fakevz hack/test-vm -race -skip '^TestFirstRun[14]' -coverprofile bin/vz.cover ./sandbox/vz
	go run ./hack/coverage -least 85 -list sandbox/vz/uncovered.txt bin/vz.cover
	$(SUDO) hack/real-root hack/with-fakevz hack/test-vm -race -run TestPodOnVZ ./sandbox
	$(SUDO) hack/real-root hack/with-fakevz hack/test-vm -run '$(MAC_TESTS)' ./test/conformance
	$(SUDO) hack/real-root hack/test-vm -race $(VM_RACED)
	$(SUDO) hack/real-root hack/test-vm $(filter-out $(VM_RACED),$(VM_PACKAGES))

test-node: setup guest ## a kubelet and a control plane on cri-vz; builds them once, some 10 minutes
	bin=$$(test/node/kubernetes/build); \
	  $(SUDO) hack/real-root env KUBERNETES_BIN="$$bin" go test -count 1 -timeout 60m -parallel 3 -v ./test/node

test-long: test ## what does not fit into CI's 20 minutes: fuzzing, arm64, repeats
	$(SUDO) hack/real-root hack/test-long

critest: setup guest ## cri-tools' critest, found on PATH: make critest CRITEST_REGISTRY=host:port [CRITEST_PARALLEL=2]
	$(SUDO) hack/real-root go run ./test/critest -parallel $(CRITEST_PARALLEL) -registry '$(CRITEST_REGISTRY)'

bench: setup guest ## the figures, as ratios from one run
	$(SUDO) hack/real-root hack/bench

kernel: setup ## build the fast all-built-in kernel (some 10 minutes, cached) and its guest
	$(SUDO) hack/setup kernel
	hack/kernel/build
	$(MAKE) guest

clean:
	rm -rf bin dist
