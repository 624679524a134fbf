# An image that runs studies, on a CPU or on NVIDIA GPUs.
#
#     docker build --target cpu  --tag autocompress:cpu  .
#     docker build --target cuda --tag autocompress:cuda --build-arg VERSION=1.2.3 .
#
#     docker run --rm --volume "$PWD:/studies" autocompress:cpu                    # the quickstart
#     docker run --rm --volume "$PWD:/studies" --user "$(id -u):$(id -g)" \
#         --gpus all --shm-size 2g autocompress:cuda mine.toml --delta 0.5
#
# Study files, data, results and caches are all in the one folder that is mounted. The CUDA image
# needs a driver and the NVIDIA container toolkit on the host; PyTorch brings the rest of CUDA.

ARG PYTHON=3.13

# The wheel. VERSION is what git would tell, which a build context without .git can't.
FROM python:${PYTHON}-slim-trixie AS wheel
ARG VERSION=0.0.0
ENV SETUPTOOLS_SCM_PRETEND_VERSION=${VERSION}
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY autocompress autocompress
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# What both images have: a user without rights, one folder for everything.
FROM python:${PYTHON}-slim-trixie AS base
ARG VERSION=0.0.0
LABEL org.opencontainers.image.title="autocompress" \
      org.opencontainers.image.description="Makes trained convolutional networks small and fast, within an accuracy tolerance." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The folder is open to any user, for --user; its caches outlive the container.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/studies \
    USER=autocompress \
    AUTOCOMPRESS_HOME=/studies/.cache/autocompress \
    TORCH_HOME=/studies/.cache/torch \
    HF_HOME=/studies/.cache/huggingface
RUN useradd --uid 1000 --no-create-home --home-dir /studies autocompress \
    && install --directory --owner=autocompress --mode=1777 /studies
WORKDIR /studies

# CPU: PyTorch without the libraries of CUDA.
FROM base AS cpu
ARG EXTRAS=zoo,tasks,postgres,s3
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip install --index-url "${TORCH_INDEX}" 'torch>=2.11,<3' 'torchvision>=0.26,<1'
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install "$(echo /wheels/*.whl)[${EXTRAS}]"
USER 1000
VOLUME /studies
ENTRYPOINT ["python", "-m", "autocompress.study"]

# CUDA: PyPI's PyTorch, with the libraries of CUDA as packages.
FROM base AS cuda
ARG EXTRAS=zoo,tasks,postgres,s3
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -m pip install 'torch>=2.11,<3' 'torchvision>=0.26,<1'
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install "$(echo /wheels/*.whl)[${EXTRAS}]"
USER 1000
VOLUME /studies
ENTRYPOINT ["python", "-m", "autocompress.study"]
