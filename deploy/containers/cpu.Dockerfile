# A CPU node: vLLM's CPU build by the recipe of `make setup`, which leaves out packages built for CUDA.
ARG BASE=python:3.11-slim
FROM ${BASE}
# g++ compiles what torch.compile makes; libnuma is vLLM's; ssh and iproute2 are for people who look around.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 iproute2 procps \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 megatoken
WORKDIR /opt/megatoken/src
COPY deploy/requirements/cpu.txt deploy/requirements/cpu.txt
# TORCH_INDEX: PyTorch's CPU wheel index, for an image without CUDA libraries (4 GB less).
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} torch==2.13.0 \
    && pip install --no-cache-dir --no-deps -r deploy/requirements/cpu.txt \
    && pip install --no-cache-dir --constraint deploy/requirements/cpu.txt "ray[default]==2.60.0"
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && rm -rf /opt/megatoken/src/*
USER megatoken
WORKDIR /home/megatoken
ENV PYTHONUNBUFFERED=1
CMD ["megatoken", "--help"]
