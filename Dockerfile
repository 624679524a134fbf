# autocompress in a container.
#
#   docker build --target cpu --build-arg VERSION=0.1.0 -t autocompress .
#   docker build --target cuda --build-arg VERSION=0.1.0 -t autocompress:cuda .
#   docker run --rm -v "$PWD:/work" autocompress mine.toml
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" autocompress:cuda mine.toml
#
# Studies are read from and written to /work; it must be writable by the user of the container
# (add `--user "$(id -u):$(id -g)"` for your own). /cache keeps decoded images and layer times.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY . .
# There is no git here, so the version is told.
ARG VERSION=0.1.0.dev0
RUN pip install --no-cache-dir "build>=1.2,<2" \
    && SETUPTOOLS_SCM_PRETEND_VERSION_FOR_AUTOCOMPRESS="${VERSION}" python -m build --wheel --outdir /dist

FROM python:${PYTHON}-slim AS base
LABEL org.opencontainers.image.title="autocompress" \
      org.opencontainers.image.description="Makes trained convolutional networks small and fast" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PYTHONUNBUFFERED=1 \
    AUTOCOMPRESS_HOME=/cache \
    HOME=/cache
RUN useradd --uid 1000 --no-create-home autocompress \
    && mkdir /cache /work \
    && chmod 1777 /cache /work
WORKDIR /work

FROM base AS cpu
# PyTorch's own index has wheels without CUDA, a tenth of the size.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<3" "torchvision>=0.26,<1"
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir /dist/*.whl "psycopg[binary]>=3.2,<4" "boto3>=1.34,<2"
USER 1000
ENTRYPOINT ["python", "-m", "autocompress.study"]

FROM base AS cuda
# These wheels bring CUDA along; the machine needs its driver and the NVIDIA container toolkit.
RUN pip install --no-cache-dir "torch>=2.11,<3" "torchvision>=0.26,<1"
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir /dist/*.whl "psycopg[binary]>=3.2,<4" "boto3>=1.34,<2"
USER 1000
ENTRYPOINT ["python", "-m", "autocompress.study"]
