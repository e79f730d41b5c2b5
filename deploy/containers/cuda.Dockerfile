# An NVIDIA node: vLLM's own image of the pinned release, with Ray and Megatoken.
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN id megatoken >/dev/null 2>&1 || useradd --create-home megatoken
WORKDIR /opt/megatoken/src
COPY . .
# Packages of the base stay as they are: torch, vLLM and NCCL were built for each other.
RUN python3 -m pip freeze | grep -E '^(torch|torchvision|torchaudio|vllm|triton|nvidia-.*)==' >/tmp/base.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/base.txt "ray[default]==2.60.0" . \
    && rm -rf /opt/megatoken/src/* /tmp/base.txt
USER megatoken
WORKDIR /home/megatoken
ENV PYTHONUNBUFFERED=1
ENTRYPOINT []
CMD ["megatoken", "--help"]
