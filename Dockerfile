# Images of the coordinator and of the worker.
#
#   docker build --target coordinator -t caldpo-coordinator .
#   docker build --target worker -t caldpo-worker .
#   docker build --target worker -t caldpo-worker:cpu \
#     --build-arg WORKER_BASE=docker.io/library/debian:bookworm-slim --build-arg WORKER_FEATURES= .
#
# Nothing is installed into the images that run: they are a base, a user and our programs. deploy/README.md says how they
# are used; tests/tests/deploy.rs keeps this file and the manifests in step.

ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
ARG COORDINATOR_BASE=docker.io/library/debian:bookworm-slim
# On a GPU the worker needs libnvrtc, the toolkit's headers and libnccl from the image, and libcuda from the host's driver:
# the devel image is NVIDIA's smallest that has the headers. A base of one's own must have glibc 2.36 or later, with which
# the programs are linked (Ubuntu 22.04 has 2.35); a build on an older one fails at its last step.
ARG WORKER_BASE=docker.io/nvidia/cuda:13.0.2-devel-ubuntu24.04

# --- sources ---------------------------------------------------------------------------------------------------------
FROM ${RUST_IMAGE} AS sources
WORKDIR /build
COPY . .
# The build folder below outlives a build, and cargo tells a changed file by its time alone: sources that are older than
# the last build but different (another clone, an older commit) would be taken for unchanged. Dependencies are known by
# checksum and stay compiled.
RUN find . -type f -exec touch {} +
# Unset, cargo takes all cores.
ARG CARGO_BUILD_JOBS

# --- programs without the ML stack -----------------------------------------------------------------------------------
FROM sources AS build-coordinator
RUN --mount=type=cache,id=caldpo-registry,target=/usr/local/cargo/registry \
    --mount=type=cache,id=caldpo-target,target=/build/target \
    cargo build --release --locked --no-default-features -p coordinator -p checkpoint \
    && install -D -t /out target/release/coordinator target/release/checkpoint

# --- programs with it ------------------------------------------------------------------------------------------------
FROM sources AS build-worker
# Cargo features of the worker: `cuda`, or nothing for a worker that computes on the CPU.
ARG WORKER_FEATURES=cuda
# The driver interface that is asked for at run time, not newer than the toolkit of WORKER_BASE. No toolkit is needed here.
ARG CUDARC_CUDA_VERSION=13000
RUN --mount=type=cache,id=caldpo-registry,target=/usr/local/cargo/registry \
    --mount=type=cache,id=caldpo-target,target=/build/target \
    cargo build --release --locked --features "${WORKER_FEATURES}" -p coordinator -p worker -p checkpoint \
    && install -D -t /out target/release/coordinator target/release/worker target/release/checkpoint

# --- coordinator: no burn, no CUDA -----------------------------------------------------------------------------------
FROM ${COORDINATOR_BASE} AS coordinator
# A number, because Kubernetes cannot tell whether a name is root; the same in both images, because they share folders.
RUN groupadd --gid 65532 caldpo \
    && useradd --uid 65532 --gid 65532 --home-dir /srv/caldpo --no-create-home --shell /usr/sbin/nologin caldpo \
    && install -d -o 65532 -g 65532 /srv/caldpo /var/lib/caldpo
COPY --from=build-coordinator /out/ /usr/local/bin/
COPY LICENSE /usr/share/doc/caldpo/LICENSE
RUN coordinator --version && checkpoint --version
USER 65532:65532
WORKDIR /srv/caldpo
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="caldpo coordinator" \
      org.opencontainers.image.description="Schedules distributed preference training: gRPC services, queue, journal" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/caldpo/caldpo" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# gRPC, and metrics where telemetry.metrics_listen asks for them.
EXPOSE 7070 9464
# The program itself is process 1 and handles SIGTERM: running jobs save and go back to the queue, exit code 143.
STOPSIGNAL SIGTERM
ENTRYPOINT ["coordinator"]
CMD ["--help"]

# --- worker ----------------------------------------------------------------------------------------------------------
FROM ${WORKER_BASE} AS worker
RUN groupadd --gid 65532 caldpo \
    && useradd --uid 65532 --gid 65532 --home-dir /srv/caldpo --no-create-home --shell /usr/sbin/nologin caldpo \
    && install -d -o 65532 -g 65532 /srv/caldpo
COPY --from=build-worker /out/ /usr/local/bin/
COPY LICENSE /usr/share/doc/caldpo/LICENSE
# The quickstart, so that `coordinator configs/quickstart.toml` runs inside.
COPY configs/ /srv/caldpo/configs/
# Fails here, not in a cluster, where the base is too old for the programs.
RUN coordinator --version && worker --version && checkpoint --version
USER 65532:65532
WORKDIR /srv/caldpo
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="caldpo worker" \
      org.opencontainers.image.description="One rank of distributed preference training" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/caldpo/caldpo" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# gRPC health, where --health asks for it; ports of the collectives are ephemeral.
EXPOSE 7071
# The program itself is process 1 and handles SIGTERM: its job saves first, exit code 143.
STOPSIGNAL SIGTERM
ENTRYPOINT ["worker"]
CMD ["--help"]
