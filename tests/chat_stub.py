"""A chat server over HTTP on loopback that answers as a test says, and remembers what it was asked."""

import base64
import contextlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


CAPTION = "A red kite named {name} rises over the dunes, and the camera follows it from below in warm light."


class Request(NamedTuple):
    """`name`: the clip's, from the note that --context file_name adds; `number`: how often it was asked about before."""

    name: str
    number: int
    text: str
    files: list[tuple[str, bytes]]  # (media type, content)
    body: dict
    key: str | None
    at: float


class Answer(NamedTuple):
    text: str = ""
    status: int = 200
    headers: dict = {}
    raw: bytes | None = None  # in place of the JSON around `text`
    ending: str = "stop"
    seconds: float = 0.0
    drop: bool = False  # close the connection without a word


def good(request: Request) -> Answer:
    return Answer(CAPTION.format(name=request.name))


class Stub(ThreadingHTTPServer):
    """`answer(request) -> Answer`; `requests`: all that came, `most_at_once`: how many were open together."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer=good, port=0, models=("stub-vl",)):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.models = answer, models
        self.requests: list[Request] = []
        self.sockets = []
        self.lock, self.open, self.most_at_once = threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def names(self) -> list[str]:
        return [request.name for request in self.requests]

    def note(self, body: dict, key: str | None) -> Request:
        content = body["messages"][0]["content"]
        text = content[-1]["text"]
        urls = [part[part["type"]]["url"] for part in content[:-1]]
        files = [(url[5:].partition(";")[0], base64.b64decode(url.partition(",")[2])) for url in urls]
        found = re.search('The file is called "([^"]*)"', text)
        name = found[1] if found else ""
        with self.lock:
            request = Request(name, self.names().count(name), text, files, body, key, time.monotonic())
            self.requests.append(request)
        return request

    def process_request(self, request, client_address):
        self.sockets.append(request)
        super().process_request(request, client_address)

    def stop(self) -> None:
        """As a killed process: open connections break."""
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.open += 1
            server.most_at_once = max(server.most_at_once, server.open)
        try:
            answer = server.answer(server.note(body, self.headers.get("Authorization")))
            time.sleep(answer.seconds)
        finally:
            with server.lock:
                server.open -= 1
        if answer.drop:
            self.close_connection = True
            return
        message = {"role": "assistant", "content": answer.text}
        choices = [{"message": message, "finish_reason": answer.ending}]
        raw = json.dumps({"choices": choices}).encode() if answer.raw is None else answer.raw
        self.send(answer.status, raw, answer.headers)

    def send(self, status: int, content: bytes, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(answer=good, **options):
    stub = Stub(answer, **options)
    try:
        yield stub
    finally:
        stub.stop()
