"""An OpenAI-compatible server in a thread, for tests: it does what a function says, and remembers what it was asked."""

import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def picture(kind="PNG", size=(4, 3), color=(9, 8, 7)) -> bytes:
    """An image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


class ChatServer(ThreadingHTTPServer):
    """`behave(call, body, number)` answers request `number` (from 0); `call.answer` and its neighbours do it."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Call)
        self.behave, self.bodies, self.headers = behave, [], []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Broken connections are what some tests are about."""


class Call(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            server.behave(self, body, number)
        finally:
            with server.lock:
                server.running -= 1

    def send(self, status, content, headers=(), length=None):
        """A raw response; `length` may promise more than comes."""
        self.send_response(status)
        for name, value in {"content-type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = length is not None

    def answer(self, *texts, finish_reason="stop", **message):
        """A chat completion with these texts, 100 prompt tokens and 10 a text."""
        choices = [
            {
                "index": index,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, **message},
            }
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 100, "completion_tokens": 10 * len(texts), "total_tokens": 0}
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "served",
            "choices": choices,
            "usage": usage,
        }
        self.send(200, json.dumps(body).encode())

    def fail(self, status, message, code=None, headers=()):
        """An error as OpenAI words it."""
        self.send(status, json.dumps({"error": {"message": message, "code": code}}).encode(), headers)

    def log_message(self, *_):
        """Nothing on stderr."""


@contextlib.contextmanager
def serving(behave):
    """A running server."""
    server = ChatServer(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
