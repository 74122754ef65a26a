# Everything starts here; `make help` lists the targets. Each installs what it needs: Debian packages, Envoy (into .cache/), tools (into bin/).
SHELL    := /bin/bash
PATH     := $(PATH):/usr/sbin:/sbin
ROOT     := scripts/as-root
PACKAGES := protobuf-compiler openssl procps gcc libc6-dev prometheus rsyslog rsyslog-openssl strace chromium softhsm2 swtpm libpcsclite-dev pkg-config
FUZZTIME ?= 20s
export GOFLAGS ?= -tags=grpcnotrace # no trace pages of gRPC: their templates make the linker keep every method
AGENT    := -tags=grpcnotrace,nethttpomithttp2 ./cmd/node-agent # net/http asks and serves by HTTP/1.1; gRPC has an HTTP/2 of its own

.DEFAULT_GOAL := all
.PHONY: all help build build-pkcs11 build-yubikey build-cloudkms release images vet quick up demo test race lint fuzz crash bench e2e cluster-test generate install clean

all: build vet quick ## build, vet, and run the tests that need nothing installed

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9][a-z0-9 -]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build ca and node-agent into bin/
	go build -o bin/ ./cmd/ca && go build -o bin/ $(AGENT)

release images: ## the same as they are shipped: static, position independent, reproducible; as images for containers
	export CGO_ENABLED=0 && build() { go build -trimpath -buildmode=pie -ldflags='-s -w' -o bin/release/ "$$@"; } && build ./cmd/ca && build $(AGENT)$(if $(filter images,$@), && go run ./scripts/images bin/release bin/images)

build-pkcs11 build-yubikey build-cloudkms: build-%: ## bin/ca that can keep the root's key in an HSM, a YubiKey or a cloud (docs/keys.md)
	go build -tags=grpcnotrace,$* -o bin/ca ./cmd/ca

vet: ## go vet
	go vet ./...

quick: ## go test, without what needs Docker or Envoy
	go test ./...

up demo: build bin/shop bin/demo ## a mesh of Docker containers with real Envoys, until Ctrl-C; with a story, which ends with figures
	scripts/install-envoy && scripts/install-docker
	$(ROOT) bin/demo $(if $(filter up,$@),up,story)

bin/shop bin/demo: FORCE
	@CGO_ENABLED=0 go build -o $@ $(if $(filter bin/shop,$@),./test/shop,./deploy/demo)

install: ## install all that tests need
	scripts/install-packages $(PACKAGES) && scripts/install-envoy && scripts/install-otelcol && scripts/install-validators && scripts/install-plugin && scripts/install-certmanager && scripts/install-docker -own && scripts/install-kubernetes && scripts/install-machine && scripts/install-tools fsck omniwitness step-ca pilot-agent helm

test: install build ## everything, with race detector, real Envoy and real Docker; nothing is skipped
	go build -o bin/with-docker ./scripts/with-docker
	$(ROOT) env REQUIRE_ALL=1 bin/with-docker go test -race -timeout 20m ./... && $(ROOT) env REQUIRE_ALL=1 go test -race -tags=grpcnotrace,pkcs11,yubikey ./pkg/ca/keys

race: ## go test -race, without what needs Docker or Envoy
	go test -race ./...

e2e: install build ## the tests in test/: real programs, real Envoy, real Docker
	$(ROOT) env REQUIRE_ALL=1 go test -race -v -timeout 20m ./test/...

cluster-test: ## the tests in whole Kubernetes clusters: real nodes, real pods
	scripts/install-envoy && scripts/install-kubernetes && scripts/install-tools helm pilot-agent
	$(ROOT) env REQUIRE_ALL=1 MESHID_CLUSTER=1 go test -race -count=1 -p 1 -timeout 30m -run Cluster $$(grep -rl --include='*_test.go' 'StartCluster(' test | xargs -n 1 dirname | sort -u | sed 's:^:./:')

lint: ## golangci-lint, with the rules of .golangci.yml
	scripts/install-tools golangci-lint && bin/golangci-lint run --allow-parallel-runners ./...

fuzz: ## each fuzz target for FUZZTIME (20s)
	scripts/each-fuzz-target $(FUZZTIME)

crash: install ## 10,000 power failures of the ledger, 300 kills of the CA under load: nobody has a certificate without a record
	$(ROOT) env MESHID_CRASH_POINTS=10000 MESHID_CRASH_KILLS=300 go test -count=1 -v -timeout 60m -run '^TestFault_F([1-5]|14|18)_' ./pkg/ledger ./test/hostile

bench: ## the benchmarks; docs/performance.md says what they should be
	scripts/install-envoy && scripts/install-kubernetes && $(ROOT) env MESHID_CLUSTER=1 go test -run '^$$' -bench . -benchmem -timeout 60m ./...

generate: ## Go from .proto files, and what is generated into docs/ and deploy/
	scripts/install-packages protobuf-compiler libprotobuf-dev && scripts/install-tools protoc-gen-go protoc-gen-go-grpc helm
	PATH=$(CURDIR)/bin:$$PATH protoc -I. --go_out=. --go_opt=module=github.com/meshid/meshid \
		--go-grpc_out=. --go-grpc_opt=module=github.com/meshid/meshid proto/*/*/*.proto
	go generate ./...
	go test -count=1 -run 'TestConfiguration|TestMetrics|TestRecord|TestManifests' ./test/docs ./test/helm -update

clean: ## remove what was built and installed here
	rm -rf bin .cache

FORCE:
