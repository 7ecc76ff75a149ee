# docker build -t chat-app . && docker run -p 127.0.0.1:8005:8005 -v chat:/data --env-file .env chat-app
# Also with --read-only --tmpfs /tmp: only /data is written, and what SQLite sorts beside memory.
FROM python:3.13-slim

# The service's packages and Litestream (README: "Growing"); nothing that only tests need, nor uv.
WORKDIR /app
COPY pyproject.toml ./
RUN pip install --no-cache-dir --root-user-action=ignore --target=/tmp/uv uv \
    && /tmp/uv/bin/uv sync --no-cache --no-dev --extra shards --python=/usr/local/bin/python \
    && rm -r /tmp/uv uv.lock
COPY . ./
RUN useradd --uid 10001 --no-create-home app && install -d -o app /data

USER 10001
ENV PATH=/app/.venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 PORT=8005 DATABASE_URL=sqlite:////data/chat.db
VOLUME /data
EXPOSE 8005
HEALTHCHECK --start-period=20s --timeout=10s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health')"]
# Exec form: the service is process 1 and hears SIGTERM itself.
ENTRYPOINT ["/app/.venv/bin/python", "chat_app.py"]
