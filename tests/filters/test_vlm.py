"""The VLM filter against a server that answers well, badly, late or not at all."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from dreamgen.core.clip import Clip
from dreamgen.filters.vlm import PROMPTS, Unreadable, Vlm, read_score

CLIPS = [Clip(id=f"c{k}", video=np.full((5, 8, 12, 3), 40 * k, np.uint8), video_hz="10", instruction=f"go {k}")
         for k in range(3)]  # fmt: skip


class Server(ThreadingHTTPServer):
    """Answers each request by `reply(request body, its number)`: a status and a text, or None to hang."""

    def __init__(self, reply: Callable) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.headers, self.lock = reply, [], [], threading.Lock()
        self.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append((self.path, dict(self.headers)))
            number = len(self.server.asked)
        answer = self.server.reply(body, number)
        if answer is None:
            time.sleep(1)
            return
        status, text = answer
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/v1")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None: ...


def said(text: str | None) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def serve() -> Iterator[Callable]:
    servers = []

    def start(reply: Callable) -> Server:
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asks(server: Server, **changes) -> Vlm:
    return Vlm(**{"url": server.url, "model": "tiny-vlm", "pause": 0.01, "timeout": 5.0, **changes})


def test_scores_are_in_the_order_of_the_clips(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")

    def reply(body: dict, number: int) -> tuple[int, str]:
        k = int(body["messages"][0]["content"][1]["text"].split('"go ')[1][0])
        time.sleep(0.05 * (2 - k))  # the last clip is answered first
        return said(f'<think>{{"score": 1}}</think>\n```json\n{{"score": {3 * k + 2}, "reason": "x"}}\n```')

    server = serve(reply)
    one = asks(server, key_variable="MY_KEY", parallel=3, extra={"seed": 5})
    np.testing.assert_allclose(one.score(CLIPS, []), [0.2, 0.5, 0.8])
    path, headers = server.headers[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    body = server.asked[0]
    assert body["model"] == "tiny-vlm" and body["seed"] == 5 and body["temperature"] == 0
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "text"] and one.name == "vlm_instruction"


def test_the_picture_holds_the_frames_in_reading_order():
    ramp = np.arange(7, dtype=np.uint8)[:, None, None, None] * 30 + np.zeros((7, 8, 12, 3), np.uint8)
    one = Vlm(url="http://localhost:1/v1", model="m", frames=4, columns=3, height=16)
    body = one.body(Clip(id="c", video=ramp, video_hz="10", instruction="go {home}"))
    head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert head == "data:image/png;base64" and picture.shape == (2 * 16 + 2, 3 * 24 + 2 * 2, 3)
    assert [picture[8, 12 + 26 * k, 0] for k in range(3)] == [0, 60, 120] and picture[26, 12, 0] == 180
    text = body["messages"][0]["content"][1]["text"]
    assert '"go {home}"' in text and "shows 4 frames" in text and '{"score": N' in text


def test_errors_of_the_server_are_retried_then_told(serve):
    server = serve(lambda body, number: (503, "busy") if number < 3 else said('{"score": 10}'))
    assert asks(server, parallel=1).score(CLIPS[:1], [])[0] == 1.0 and len(server.asked) == 3
    server = serve(lambda body, number: (500, "broken"))
    with pytest.raises(ValueError, match=r"did not answer about clip 'c0' in 3 attempts \(status 500\)"):
        asks(server, retries=2).score(CLIPS[:1], [])
    server = serve(lambda body, number: None)
    with pytest.raises(ValueError, match="did not answer.*timed out"):
        asks(server, retries=1, timeout=0.1).score(CLIPS[:1], [])
    port = server.server_address[1]
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="did not answer.*refused"):
        Vlm(url=f"http://127.0.0.1:{port}/v1", model="m", retries=0).score(CLIPS[:1], [])


def test_a_refused_request_is_not_repeated(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for status in (401, 404, 302):
        server = serve(lambda body, number, status=status: (status, "no such model"))
        with pytest.raises(ValueError, match=f"refuses the request for model 'tiny-vlm' with status {status}"):
            asks(server).score(CLIPS[:1], [])
        assert len(server.asked) == 1


@pytest.mark.parametrize("key", ["sk-SE\nCRET", "sk-SE\rCRET", "sk-SE\x7fCRET", "sk-SE\u2026CRET"])
def test_a_key_that_no_header_can_carry_is_not_told(serve, monkeypatch, key):
    server = serve(lambda body, number: said('{"score": 10}'))
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="environment variable MY_KEY holds a character") as caught:
        asks(server, key_variable="MY_KEY").score(CLIPS[:1], [])
    links = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert not any("SE" in str(link) or "CRET" in str(link) for link in links) and not server.asked


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_key_from_a_file_may_end_its_line(serve, monkeypatch, end):
    server = serve(lambda body, number: said('{"score": 10}'))
    monkeypatch.setenv("MY_KEY", "sk-secret" + end)
    asks(server, key_variable="MY_KEY").score(CLIPS[:1], [])
    assert server.headers[0][1]["Authorization"] == "Bearer sk-secret"


def test_settings_that_a_model_does_not_take_are_left_out(serve):
    server = serve(lambda body, number: said("what?") if number == 1 else said('{"score": 10}'))
    wanted = {"max_completion_tokens": 4096}
    asks(server, max_tokens=None, temperature=None, extra=wanted).score(CLIPS[:1], [])
    assert all(not {"max_tokens", "temperature"} & set(body) for body in server.asked) and len(server.asked) == 2
    assert server.asked[0]["max_completion_tokens"] == 4096
    server = serve(lambda body, number: (400, "Unsupported parameter: 'max_tokens'"))
    with pytest.raises(ValueError, match=r"'max_tokens'.*max_tokens=null, temperature=null.*`extra`"):
        asks(server).score(CLIPS[:1], [])


def test_malformed_answers_are_asked_again_and_then_abstain(serve, caplog):
    bad = ["", None, "I would say 7", '{"score": 11}', '{"score": "high"}', '{"score": true}', "[]"]
    for text in bad:
        with pytest.raises(Unreadable):
            read_score(text)
    server = serve(lambda body, number: said(bad[2]) if number == 1 else said('{"score": 4}'))
    assert asks(server).score(CLIPS[:1], [])[0] == 0.4
    assert [body["temperature"] for body in server.asked] == [0.0, 0.5]
    server = serve(lambda body, number: (200, "<html>not a chat completion</html>"))
    assert np.isnan(asks(server, retries=1).score(CLIPS[:1], [])[0]) and "abstains on clip 'c0'" in caplog.text


def test_questions_are_files(tmp_path):
    assert {path.stem for path in PROMPTS.glob("*.md")} == {"instruction", "physics"}
    assert Vlm(url="http://h/v1", model="m", question="physics").name == "vlm_physics"
    mine = tmp_path / "tidy.md"
    mine.write_text("Is it tidy? {instruction}")
    assert Vlm(url="http://h/v1", model="m", question=str(mine)).name == "vlm_tidy"
    mine.write_text('{"score": 1}')
    with pytest.raises(ValueError, match="has a field other than"):
        Vlm(url="http://h/v1", model="m", question=str(mine))
    with pytest.raises(ValueError, match="is none of instruction, physics and no file"):
        Vlm(url="http://h/v1", model="m", question="beauty")
    with pytest.raises(ValueError, match="expected http"):
        Vlm(url="localhost:8000", model="m")
