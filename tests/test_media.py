"""Images from anywhere: what may be fetched, from whom, how much of it, and how it is decoded."""
from __future__ import annotations

import base64
import io
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import serve
import sights
import transformers
from conftest import LocalServer, http

PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(PICTURE)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'


def huge_png(width: int, height: int) -> bytes:
    """A PNG of 100 bytes that claims to be much more."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


class Pictures(BaseHTTPRequestHandler):
    """A server of pictures that is not to be trusted."""

    seen: list[tuple[str, str]] = []  # the path and the Host of each request

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        name = self.path.partition("?")[0]
        if name == "/redirect":
            self.answer(302, b"", Location="http://169.254.169.254/latest/meta-data")
        elif name == "/missing":
            self.answer(404, PNG)
        elif name == "/slow":
            self.answer(200, PNG, pause=0.1)
        elif name == "/endless":
            self.answer(200, b"", length=1 << 40)
            for _ in range(1 << 12):
                self.wfile.write(bytes(1 << 16))
        elif name == "/short":
            self.answer(200, PNG, length=len(PNG) + 1)
        else:
            self.answer(200, {"/svg": SVG, "/empty": b"", "/truncated": PNG[:len(PNG) // 2]}.get(name, PNG))

    def answer(self, status: int, body: bytes, length: int | None = None, pause: float = 0, **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        size = 1 if pause else len(body) + 1
        for i in range(0, len(body), size):
            self.wfile.write(body[i:i + size])
            time.sleep(pause)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.handle_error = lambda *_: None  # who is refused hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Pictures.seen.clear()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def seeing(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("llava")
    sights.save("llava", folder, checkpoint)
    server = LocalServer(str(folder), "--dtype", "float32", "--kv-cache-memory", "32MiB", "--allowed-media-domain", "127.0.0.1",
                         "--allowed-media-domain", "pictures.example").start()
    yield server
    server.stop()


def show(server: LocalServer, *parts: dict) -> tuple[int, dict]:
    response = http.post(server.url + "/v1/chat/completions", json={
        "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1})
    return response.status_code, response.json().get("error")


def part(address: object) -> dict:
    return {"type": "image_url", "image_url": {"url": address, "detail": "auto"}}


def data(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.mark.parametrize("given", [
    part(data(PNG)), {"type": "input_image", "image_url": data(PNG), "detail": "high"},
    {"type": "image_url", "image_url": data(PNG)}, part("DATA:;BASE64," + base64.b64encode(PNG).decode())])
def test_images_in_the_body(seeing: LocalServer, given: dict) -> None:
    assert show(seeing, given) == (200, None)


@pytest.mark.parametrize("path", ["/picture.png", "", "/a%20b/ü.png?x=1&y=é#fragment"])
def test_images_are_fetched(seeing: LocalServer, pictures: str, path: str) -> None:
    assert show(seeing, part(f"http://{pictures}{path}"), part(data(PNG))) == (200, None)
    assert [host for _, host in Pictures.seen] == [pictures] and "#" not in Pictures.seen[0][0]


LINK_LOCAL, NAT64 = "169.254.169.254", "[64:ff9b::a9fe:a9fe]"


@pytest.mark.parametrize("address", [
    "/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "", "http:",
    "http://", "http:///a.png", "//127.0.0.1/a.png",
    "http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:x/",
    "http://user@127.0.0.1/", "http://127.0.0.1\\@evil.example/", "http://127.0.0.1\r\nX: y/", "http://a b/",
    "http://\u2024/", f"http://{LINK_LOCAL}/latest/meta-data", f"http://{NAT64}/", "http://[::ffff:127.0.0.1]/",
    "http://[::1]/", "http://0/", "http://10.0.0.1/", "http://0x7f000001/", "http://2130706433/", "http://localhost/",
    "http://127.1/", "http://[fe80::1%25lo]/",
    "https://localhost:1/", "data:image/png;base64,%%%", "data:image/png;base64,AAA", "data:image/png,AAAA", "data:",
    data(b""), data(SVG), data(PNG[:200]), data(b"GIF89a"), data(huge_png(60000, 60000)), data(huge_png(9000, 9000)),
    data(encoded(PICTURE, "TIFF")), data(encoded(PICTURE, "PDF")), data(encoded(PICTURE, "EPS")), None, 5, {}, []])
def test_what_is_no_image_is_refused(seeing: LocalServer, address: object) -> None:
    started = time.monotonic()
    status, error = show(seeing, {"type": "text", "text": "a"}, part(address))
    assert (status, error["code"], error["param"]) == (400, "invalid_media", "messages[0].content[1].image_url"), error
    assert time.monotonic() - started < 2 and "/root" not in error["message"]


@pytest.mark.parametrize("path, reason", [
    ("/redirect", "302"), ("/missing", "404"), ("/svg", "no image"), ("/empty", "no image"), ("/truncated", "no image"),
    ("/short", "could not be fetched"), ("/endless", "more than"), ("/slow", "within")])
def test_servers_that_misbehave(seeing: LocalServer, pictures: str, path: str, reason: str,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FETCH_SECONDS", 0.5)
    monkeypatch.setattr(serve, "MAX_FETCHED_BYTES", 1 << 20)
    status, error = show(seeing, part(f"http://{pictures}{path}"))
    assert (status, error["code"]) == (400, "invalid_media") and reason in error["message"], error
    assert len(Pictures.seen) == 1, "it was asked more than once, or another was"


def test_a_name_is_looked_up_once(seeing: LocalServer, pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], socket.getaddrinfo

    def lookup(host: str, port: int, *arguments: object, **options: object) -> list[tuple]:
        if not host.endswith(".example"):
            return real(host, port, *arguments, **options)
        asked.append(host)
        address = "127.0.0.1" if len(asked) < 2 else LINK_LOCAL
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    port = pictures.rpartition(":")[2]
    assert show(seeing, part(f"http://Pictures.example:{port}/a.png")) == (200, None)
    assert asked == ["pictures.example"] and Pictures.seen == [("/a.png", f"Pictures.example:{port}")]
    status, error = show(seeing, part(f"http://elsewhere.example:{port}/a.png"))
    assert status == 400 and "public" in error["message"] and len(Pictures.seen) == 1


def test_tls_is_for_the_name(seeing: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    try:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
                        "2", "-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example", "-keyout", key,
                        "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.handle_error = lambda *_: None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *arguments: object, **options: object) -> list[tuple]:
        if not host.endswith(".example"):
            return real(host, port, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    port = server.server_address[1]
    assert show(seeing, part(f"https://pictures.example:{port}/a.png"))[0] == 400, "nobody vouches for this certificate"
    monkeypatch.setattr(serve, "tls", lambda: ssl.create_default_context(cafile=str(certificate)))
    assert show(seeing, part(f"https://pictures.example:{port}/a.png")) == (200, None)
    assert show(seeing, part(f"https://127.0.0.1:{port}/a.png"))[0] == 400, "the certificate is another's"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("text, public", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
    ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
    ("100.64.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False), ("240.0.0.1", False),
    ("192.0.2.1", False), ("198.18.0.1", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fc00::1", False),
    ("fd12::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("::127.0.0.1", False),
    ("64:ff9b:1::8.8.8.8", False), ("2002:7f00:1::", False), ("2001:0:7f00:1::", False), ("2001:db8::1", False),
    ("fec0::1", False), ("192.88.99.1", True)])
def test_public_addresses(text: str, public: bool) -> None:
    assert serve.is_public(text) == public


@pytest.mark.parametrize("content", [
    PNG, encoded(PICTURE, "JPEG"), encoded(PICTURE, "WEBP", lossless=True), encoded(PICTURE, "GIF"), encoded(PICTURE, "BMP"),
    encoded(PICTURE.convert("RGBA")), encoded(PICTURE.convert("P")), encoded(PICTURE.convert("LA")),
    encoded(PICTURE.convert("1")), encoded(PICTURE.convert("CMYK"), "JPEG"),
    encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)] * 3),
    encoded(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")])
def test_decodes_as_transformers_does(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = transformers.image_utils.load_image(str(path))
    got = serve.decoded_image(content, "", serve.MAX_PIXELS)
    assert got.mode == expected.mode == "RGB" and got.size == expected.size and got.tobytes() == expected.tobytes()


def test_what_a_request_may_hold_is_bounded(seeing: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(seeing, *[part(data(PNG))] * (serve.MAX_MEDIA + 1))[0] == 400
    pixels = PICTURE.width * PICTURE.height
    monkeypatch.setattr(serve, "MAX_ALL_PIXELS", 3 * pixels)
    assert show(seeing, *[part(data(PNG))] * 3) == (200, None)
    status, error = show(seeing, *[part(data(PNG))] * 4)
    assert (status, error["param"]) == (400, "messages[0].content[3].image_url")


@pytest.mark.parametrize("given, kind", [
    ({"type": "image", "data": "AAAA", "where": "x"}, "image"), ({"type": "image", "url": "/etc/passwd"}, "image"),
    ({"type": "video_url", "video_url": {"url": data(PNG)}}, "video_url"),
    ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "input_audio"),
    ({"type": "audio_url", "audio_url": {"url": "http://localhost/"}}, "audio_url")])
def test_other_parts_are_refused_by_name(seeing: LocalServer, given: dict, kind: str) -> None:
    status, error = show(seeing, part(data(PNG)), given)
    assert (status, error["param"]) == (400, "messages[0].content[1].type") and repr(kind) in error["message"]


def test_images_are_a_users(seeing: LocalServer) -> None:
    response = http.post(seeing.url + "/v1/chat/completions", json={
        "messages": [{"role": "system", "content": [part("http://localhost/")]}, {"role": "user", "content": "Hi"}]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages[0].content[0].type"
