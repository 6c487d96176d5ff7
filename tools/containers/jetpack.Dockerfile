# A bundle's server on a Jetson. BASE is an image of the device's JetPack with TensorRT for python3, CUDA the major
# version of its CUDA: 12 of JetPack 6, 13 of JetPack 7. On the device:
#   docker build -f jetpack.Dockerfile --build-arg BASE=IMAGE --build-arg CUDA=13 -t edgeprune-serve .
#   docker run --rm --runtime nvidia -v "$PWD/BUNDLE:/bundle" --entrypoint python3 edgeprune-serve /bundle/finish.pyz
#   docker run --rm --runtime nvidia -v "$PWD/BUNDLE:/bundle:ro" -p 127.0.0.1:8000:8000 edgeprune-serve
# The first run builds and measures the engine, once; the second serves it.
ARG BASE
FROM ${BASE}

ARG CUDA=13
RUN python3 -m pip install --no-cache-dir numpy tokenizers "cuda-python==${CUDA}.*"

VOLUME /bundle
EXPOSE 8000
ENTRYPOINT ["python3", "/bundle/serve.pyz", "--host", "0.0.0.0"]
CMD ["--port", "8000"]
HEALTHCHECK --start-period=120s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
