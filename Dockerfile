# Two images from one file; both run the scripts that `make serve` runs.
#
#   docker build --target cpu -t kelp:cpu .
#   docker build --target gpu -t kelp:gpu --build-arg TRITON_TAG=25.10-trtllm-python-py3 .
#
# The development machine reaches no container registry: there these are linted (hadolint), not built.
ARG TRITON_TAG=25.10-trtllm-python-py3

FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl libpython3.12 make python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 kelp \
    && install --directory --owner kelp /opt/kelp
WORKDIR /opt/kelp
COPY --chown=10001 . .
USER 10001
# TensorRT-LLM and its torch live in the image's own site-packages; the environment adds kelp to them.
ENV HOME=/home/kelp VENV_FLAGS=--system-site-packages
RUN scripts/setup.sh
EXPOSE 8000 8001 8002 9000
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s \
    CMD ["curl", "-fsS", "http://localhost:8000/v2/models/llm/ready"]
ENTRYPOINT ["/opt/kelp/.venv/bin/kelp", "serve", "--host", "0.0.0.0"]

FROM debian:12-slim AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates curl gcc libc6-dev libpython3.11 make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 kelp \
    && install --directory --owner kelp /opt/kelp
WORKDIR /opt/kelp
COPY --chown=10001 . .
USER 10001
ENV HOME=/home/kelp TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN scripts/setup.sh
EXPOSE 8000 8001 8002 9000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["curl", "-fsS", "http://localhost:8000/v2/models/llm/ready"]
ENTRYPOINT ["/opt/kelp/.venv/bin/kelp", "serve", "--host", "0.0.0.0"]
