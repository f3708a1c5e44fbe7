# qpeft serve.  CPU:  docker build -t qpeft-serve .
#               CUDA: docker build -t qpeft-serve:cuda --build-arg CUDA=1 --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .
# Adapters and LMs are not in the image: they lie in /models, which is mounted read-only. See docs/serving.md.
ARG BASE=ubuntu:24.04

FROM ${BASE} AS build
ARG CUDA=0
ARG TORCH=2.13.0
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/qpeft
ENV PATH=/opt/qpeft/bin:$PATH
RUN if [ "$CUDA" = 1 ]; then pip install --no-cache-dir torch==$TORCH; \
    else pip install --no-cache-dir torch==$TORCH --index-url https://download.pytorch.org/whl/cpu; fi
RUN pip install --no-cache-dir "setuptools>=77" "cmake>=3.25" ninja
COPY . /src
RUN cd /src && QPEFT_CUDA=$CUDA QPEFT_CUDA_ARCHS=all pip install --no-cache-dir --no-build-isolation '.[serve]'

FROM ubuntu:24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 libgomp1 \
    && rm -rf /var/lib/apt/lists/* && useradd --uid 10001 --no-create-home --home-dir /tmp qpeft
COPY --from=build /opt/qpeft /opt/qpeft
ENV PATH=/opt/qpeft/bin:$PATH HF_HUB_OFFLINE=1 QPEFT_CACHE=/tmp/qpeft PYTHONUNBUFFERED=1
USER 10001
VOLUME /models
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=20s --start-period=120s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ready', timeout=18)"]
ENTRYPOINT ["qpeft", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["--model", "/models/adapter", "--base-model", "/models/lm"]
