# One image for server and clients: `docker build -t fedpeft .`, then `docker run fedpeft server ...` or `... client ...`.
FROM python:3.12-slim

# torch without CUDA; a site with a GPU builds with --build-arg INDEX=https://pypi.org/simple
ARG INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /src/
COPY fedpeft /src/fedpeft
RUN pip install --no-cache-dir --extra-index-url "$INDEX" /src

RUN useradd --create-home --uid 1000 fedpeft && mkdir /run-folder && chown fedpeft /run-folder
USER fedpeft
WORKDIR /home/fedpeft
ENV OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-m", "fedpeft.health", "127.0.0.1:8080"]
ENTRYPOINT ["fedpeft"]
CMD ["--help"]
