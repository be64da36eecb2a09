"""An OpenAI-compatible server on this machine that answers as a test says."""

import http.server
import json
import threading
from collections.abc import Callable
from typing import Any

from rethinker_jax.config_curation import CAPTION_PROMPT

Row = dict[str, Any]
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
SECRET = "sk-not-to-be-seen-123"


class Server:
    """A chat server whose replies are those of `reply`; `seen` holds bodies and headers in the order they came."""

    def __init__(self, reply: Callable[[Row], Answer]):
        self.seen: list[tuple[Row, dict[str, str]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((body, dict(self.headers)))
                status, headers, data = reply(body)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has given up
                    self.close_connection = True

            def do_GET(self) -> None:  # what a redirect of a POST becomes
                outer.seen.append(({}, dict(self.headers)))
                self.send_error(405)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing on the terminal."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def options(self, *more: str, url: str = "") -> list[str]:
        url = url or self.url
        return [
            "distill", "--data", "rows.jsonl", "--output", "out.jsonl", "distill.caption.model=seer",
            f"distill.caption.url={url}", "distill.reason.model=thinker", f"distill.reason.url={url}",
            "distill.reason.n=2", "distill.retries=1", "distill.backoff_s=0.01", "distill.timeout_s=60",
            "distill.num_threads=3", *more,
        ]  # fmt: skip


def said(content: str | None, finish_reason: str = "stop", **more: Any) -> Answer:
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def is_caption(body: Row) -> bool:
    return body["model"] == "seer"


def good(body: Row) -> Answer:
    """Descriptions by the first bytes of the image; a right answer, with its reasoning told apart."""
    if is_caption(body):
        image, prompt = body["messages"][0]["content"]
        begin = "A picture" if prompt["text"] == CAPTION_PROMPT else "It"
        return said(f"{begin} of {len(image['image_url']['url'])} bytes.")
    return said("It is seven.\n\n\\boxed{7}", reasoning_content="I see seven.")
