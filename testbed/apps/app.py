#!/usr/bin/env python3
"""The application that the tests deploy: an HTTP server in one file, without dependencies.

    app.py --port PORT [--state DIRECTORY]

Serves   /            the version and the process id
         /health      200, or 500
         /version     {"release": GREENLIGHT_RELEASE, "version": the file VERSION, "pid": ...}
         /slow?ms=N   the same as / after N milliseconds
         /held?by=F   the same as / once the file F is gone; F.seen says that it waits
         POST /       201 and the version, after reading the body

SIGTERM lets it finish the requests it is at, close idle connections, and end with 0.

Files in its working directory make a release bad:
         BROKEN          ends with an error at its start
         UNHEALTHY       /health answers 500
         WRONG           / and /version answer with what stands in this file instead of the version
         SLOW_START      listens only after so many milliseconds
         IGNORE_TERM     does not end on SIGTERM
         ERRORS          of 1,000 answers of / so many are 500, evenly spread; their first word is the version too
         BURN            each answer of / takes so many milliseconds of processor time
         STATE_INTOLERANT  ends with an error when the state directory was written by another version
"""

import argparse
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


def read(name):
    path = Path(name)
    return path.read_text().strip() if path.exists() else None


VERSION = read("WRONG") or read("VERSION") or "none"
RELEASE = read("WRONG") or os.environ.get("GREENLIGHT_RELEASE", "")
UNHEALTHY = read("UNHEALTHY") is not None
ERRORS = int(read("ERRORS") or 0)
BURN = int(read("BURN") or 0) / 1000
answers = itertools.count(1)


def burn():
    end = time.thread_time() + BURN
    while time.thread_time() < end:
        pass


def is_planted_error():
    number = next(answers)
    return number * ERRORS // 1000 != (number - 1) * ERRORS // 1000


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An idle connection is given up after this many seconds.
    timeout = 60

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.opened(self.connection)

    def finish(self):
        self.server.closed(self.connection)
        super().finish()

    def parse_request(self):
        self.server.busy(self.connection)
        return super().parse_request()

    def handle_one_request(self):
        super().handle_one_request()
        if self.server.idle(self.connection):
            self.close_connection = True

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == "/health":
            self.answer(500 if UNHEALTHY else 200, "unhealthy\n" if UNHEALTHY else "ok\n")
        elif url.path == "/version":
            body = {"release": RELEASE, "version": VERSION, "pid": os.getpid()}
            self.answer(200, json.dumps(body) + "\n", "application/json")
        elif url.path == "/slow":
            time.sleep(int(parse_qs(url.query).get("ms", ["0"])[0]) / 1000)
            self.answer(200, f"{VERSION} {os.getpid()}\n")
        elif url.path == "/held":
            held_by = Path(parse_qs(url.query)["by"][0])
            while held_by.exists():
                Path(f"{held_by}.seen").touch()
                time.sleep(0.05)
            self.answer(200, f"{VERSION} {os.getpid()}\n")
        elif url.path == "/":
            burn()
            self.answer(500 if is_planted_error() else 200, f"{VERSION} {os.getpid()}\n")
        else:
            self.answer(404, "not found\n")

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(201, f"{VERSION} {os.getpid()}\n")

    def answer(self, status, body, kind="text/plain"):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.server.stopping:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *arguments):
        print(self.address_string(), format % arguments, flush=True)


class Server(ThreadingHTTPServer):
    # Requests that are being answered hold the end of the process up.
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, port):
        super().__init__(("0.0.0.0", port), Handler)
        self.lock = threading.Lock()
        self.waiting = set()
        self.stopping = False

    def opened(self, connection):
        if self.idle(connection):
            connection.shutdown(socket.SHUT_RD)

    def busy(self, connection):
        with self.lock:
            self.waiting.discard(connection)

    def idle(self, connection):
        """Notes a connection that waits for its next request; true when it should not."""
        with self.lock:
            if not self.stopping:
                self.waiting.add(connection)
            return self.stopping

    def closed(self, connection):
        self.busy(connection)

    def stop(self):
        # First no new connections, then no new requests on those that wait for one.
        self.shutdown()
        with self.lock:
            self.stopping = True
            for connection in self.waiting:
                connection.shutdown(socket.SHUT_RD)


def check_state(directory):
    """Leaves a trace for the next version, and meets the one that its predecessor left."""
    directory.mkdir(parents=True, exist_ok=True)
    trace = directory / "written-by"
    if read("STATE_INTOLERANT") is not None and trace.exists() and trace.read_text() != VERSION:
        sys.exit(f"cannot read the state that {trace.read_text()} left in {directory}")
    trace.write_text(VERSION)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    if read("BROKEN") is not None:
        sys.exit("this release is broken")
    if arguments.state:
        check_state(arguments.state)
    time.sleep(int(read("SLOW_START") or 0) / 1000)
    server = Server(arguments.port)
    if read("IGNORE_TERM") is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        # The handler runs on the thread that serves, which a shutdown waits for.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.stop).start())
    print(f"version {VERSION} listens on port {arguments.port}", file=sys.stderr, flush=True)
    server.serve_forever(poll_interval=0.05)
    server.server_close()


main()
