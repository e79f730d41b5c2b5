# An AMD node: vLLM's own ROCm image of the pinned release (torch, RCCL and kernels for gfx942 and gfx950), with Ray
# and Megatoken. The user is in the groups that own /dev/kfd and /dev/dri.
ARG BASE=vllm/vllm-openai-rocm:v0.32.0
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN getent group render >/dev/null || groupadd render; \
    id megatoken >/dev/null 2>&1 || useradd --create-home --groups video,render megatoken
WORKDIR /opt/megatoken/src
COPY . .
# Packages of the base stay as they are: torch, vLLM and RCCL were built for each other.
RUN python3 -m pip freeze | grep -E '^(torch|torchvision|torchaudio|vllm|triton|pytorch-triton-rocm|aiter|amd.*)( @|==)' \
        | grep '==' >/tmp/base.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/base.txt "ray[default]==2.60.0" . \
    && rm -rf /opt/megatoken/src/* /tmp/base.txt
USER megatoken
WORKDIR /home/megatoken
ENV PYTHONUNBUFFERED=1
ENTRYPOINT []
CMD ["megatoken", "--help"]
