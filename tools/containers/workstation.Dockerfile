# edgeprune on a workstation: fit, serve and all else. From the repository's root:
#   docker build -f tools/containers/workstation.Dockerfile -t edgeprune .
#   docker run --rm -v "$PWD:/work" edgeprune fit ./my-model --device jetson-orin
#   docker run --rm -v "$PWD:/work" -p 127.0.0.1:8000:8000 edgeprune serve my-model-cpu --host 0.0.0.0
ARG BASE=python:3.12-slim
FROM ${BASE}

# Pruning runs on the processor; the index's default torch is a CUDA build of several GB.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} torch

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY edgeprune edgeprune
COPY profiles profiles
ARG EXTRAS=serve
RUN pip install --no-cache-dir ".[${EXTRAS}]"

RUN useradd --create-home user
USER user
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["edgeprune"]
CMD ["--help"]
