# fourfold in a container. For CPUs:
#   docker build -t fourfold --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# For NVIDIA GPUs leave the argument out: torch's own wheels bring CUDA, and the host its driver.
#   docker run --rm --gpus all --read-only --tmpfs /tmp -v "$PWD:/data" fourfold quantize ORG/MODEL release
FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
WORKDIR /source
COPY . .
RUN python -m venv /opt/fourfold \
 && /opt/fourfold/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[report,gguf]'

FROM python:3.12-slim
COPY --from=build /opt/fourfold /opt/fourfold
RUN useradd --create-home --uid 1000 fourfold && mkdir /data && chown fourfold /data
USER fourfold
# What is written goes to /data: the Hub's cache, numba's compiled loops, OUT.
ENV PATH=/opt/fourfold/bin:$PATH HF_HOME=/data/.cache/huggingface NUMBA_CACHE_DIR=/data/.cache/numba
WORKDIR /data
ENTRYPOINT ["fourfold"]
CMD ["--help"]
