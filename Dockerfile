FROM python:3.12-slim-bookworm

# torch brings its CUDA libraries, the host the driver; Triton and the CPU kernels call a C compiler at run time. A volume
# for the hub's cache takes its owner from the folder here.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends -y g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 serve \
    && install -d -o serve /opt/serve.py /home/serve/.cache /home/serve/.cache/huggingface
ENV SERVE_CACHE=/opt/serve.py NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app
COPY requirements.txt ./
# The URL of a flash-attn wheel for this Python and torch: there is no CUDA compiler here to build one with.
ARG FLASH_ATTN=""
RUN pip install --no-cache-dir -r requirements.txt ${FLASH_ATTN:+"$FLASH_ATTN"}

COPY serve.py ./
COPY kernels kernels
USER 1000
RUN python -c "import serve; serve.default_checkpoint()"

EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/health')"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
