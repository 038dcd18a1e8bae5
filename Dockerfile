# The environment for training on NVIDIA GPUs:
#   docker build --tag spikelm .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD/runs:/home/spikelm/runs" spikelm launch nano-sd
# The devel image, because Triton compiles its launchers with gcc and DeepSpeed its operators with nvcc and g++
# when they are first used. CUDA is that of PyPI's torch 2.9 (12.8): a newer torch needs a newer base image.
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ gcc libgomp1 ninja-build python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# An environment of its own: the system's Python belongs to the system.
ENV VIRTUAL_ENV=/opt/spikelm PATH=/opt/spikelm/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/spikelm

# The large part first: a change of ours leaves this layer as it is.
RUN pip install "torch>=2.9,<2.10"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY train train
COPY serve serve
COPY configs configs
COPY spikelm spikelm
RUN pip install ".[gpu,train]" && python3 -c "import spikelm.train.trainer"

# Caches (kernels, tokens, DeepSpeed's operators) and runs belong to a user without rights.
RUN useradd --create-home --uid 10001 spikelm && install --directory --owner spikelm /home/spikelm/runs
USER spikelm
ENV SPIKELM_CACHE=/home/spikelm/.cache/spikelm
WORKDIR /home/spikelm
VOLUME ["/home/spikelm/runs"]

HEALTHCHECK --interval=5m --timeout=90s --start-period=60s \
    CMD ["spikelm", "doctor", "--json", "/tmp/doctor.json"]

# tini passes signals on and collects what ended: docker stop must reach the ranks, which save and go.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "spikelm"]
CMD ["--help"]
