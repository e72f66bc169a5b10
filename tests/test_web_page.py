"""The page at `/` and Swagger UI at `/docs`, in a real browser with the whole stack.

The expected numbers come from sentence-transformers and the map's points from numpy. The shown command is run in a
shell, and axe checks accessibility.
"""

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from checkpoints import write_qwen2_vl
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Response, expect, sync_playwright
from sentence_transformers import SentenceTransformer

from conftest import MINILM, REPOSITORY, Stack
from triton_embed.python_backend.checkpoint import repository

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
HALF_A_DIGIT = 0.005 + 1e-5  # rounding error of two digits, plus float32
AWKWARD = 'it\'s "quoted" $HOME `id` \\n <b id=bold>bold</b>\n你好 \u2028 ! 100 %'
VIOLATIONS = "addEventListener('securitypolicyviolation', event => console.error('CSP', event.violatedDirective))"


class Visit:
    """An open page, and the errors and requests that it caused."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.errors: list[str] = []
        self.error_statuses: list[int] = []
        self.sent: list[dict[str, Any]] = []
        page.add_init_script(VIOLATIONS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._on_request(request.url, request.post_data))
        page.on("response", self._on_response)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
            self.errors.append(message.text)

    def _on_request(self, url: str, body: str | None) -> None:
        if not url.startswith((f"{self.origin}/", "data:")):
            self.errors.append(f"a request to {url}")
        if body:
            self.sent.append(json.loads(body))

    def _on_response(self, response: Response) -> None:
        if response.status >= 400:
            self.error_statuses.append(response.status)

    def write(self, *texts: str) -> None:
        """Replace the rows by one row per text."""
        while self.page.locator("#rows li").count():
            self.page.locator("#rows .remove").first.click()
        for text in texts:
            self.page.click("#add")
            self.page.locator("#rows textarea").last.fill(text)

    def run(self) -> dict[str, Any]:
        """Run the request with the button; return the response once it is drawn."""
        with self.page.expect_response("**/v1/embeddings") as response:
            self.page.click("#run")
        expect(self.page.locator("#run")).to_have_attribute("aria-disabled", "false")
        body: dict[str, Any] = response.value.json()
        return body

    def numbers(self) -> np.ndarray:
        """Return the numbers of the heat map, [n, n]."""
        rows = self.page.locator(".heat tbody tr").all()
        cells = [[cell.replace("−", "-") for cell in row.locator("td").all_inner_texts()] for row in rows]
        assert all(re.fullmatch(r"-?\d\.\d\d", cell) for row in cells for cell in row)
        return np.array(cells, dtype=np.float64)

    def texts(self) -> list[str]:
        return [box.input_value() for box in self.page.locator("#rows textarea").all()]

    def overflow(self) -> int:
        """Return the pixels by which the page is wider than its window."""
        pixels: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return pixels


@pytest.fixture(scope="module")
def stack(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start minilm, bge_tiny (also 20 and 40 dimensions), gme_tiny (any dimensions, images) and bge (not ready)."""
    root = tmp_path_factory.mktemp("pages")
    models = root / "models"
    shutil.copytree(model_directory, models)
    parameters = {"checkpoint": str(write_qwen2_vl(root / "gme")), "threads": "1"}
    parameters |= {"min_image_tokens": "4", "max_image_tokens": "16", "is_matryoshka": "true"}
    repository.write_model(REPOSITORY, "gme_qwen2_vl", models, "gme_tiny", parameters)
    server = Stack(root / "log", f"--model-repository={models}")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as instance:
        yield instance


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert executable, f"No browser found: install Chromium (apt-get install chromium) as one of {BROWSERS}"
    flags = [f"--{flag}" for flag in (*FLAGS, "no-first-run")]
    launched = playwright.chromium.launch(executable_path=executable, args=flags)
    yield launched
    launched.close()


@contextmanager
def visiting(browser: Browser, origin: str, path: str = "/", **options: Any) -> Iterator[Visit]:
    """Open a page. When it is closed, check for errors and for requests to other hosts."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    try:
        visit = Visit(context.new_page(), origin)
        visit.page.goto(f"{origin}{path}")
        yield visit
        assert visit.errors == []
    finally:
        context.close()


@contextmanager
def model_page(browser: Browser, stack: Stack, model: str = "minilm", **options: Any) -> Iterator[Visit]:
    """Open the page `/`, wait for its models, and select one."""
    with visiting(browser, stack.url, **options) as visit:
        expect(visit.page.locator(f"#model option[value={model}]")).to_be_enabled()
        visit.page.select_option("#model", model)
        yield visit


@pytest.fixture(scope="module")
def network() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


@pytest.fixture(scope="module")
def vectors(network: SentenceTransformer) -> Callable[[list[str]], np.ndarray]:
    return lambda texts: network.encode(texts).astype(np.float64)


def png_image(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def test_run_draws_the_similarities_of_the_examples(browser: Browser, stack: Stack, vectors: Any) -> None:
    with model_page(browser, stack) as visit:
        texts = visit.texts()
        assert len(texts) >= 6
        response = visit.run()
        expected = vectors(texts)
        np.testing.assert_allclose(visit.numbers(), expected @ expected.T, atol=HALF_A_DIGIT)
        headers = visit.page.locator(".heat tbody th").all_inner_texts()
        assert [header.split(maxsplit=1) for header in headers] == [[str(i + 1), text] for i, text in enumerate(texts)]
        figures = visit.page.locator("#figures").inner_text()
        assert f"{len(texts)} × 384" in figures
        assert str(response["usage"]["total_tokens"]) in figures
        assert re.search(r"Round trip\s+[\d.]+ ms", figures)
        assert re.search(r"In the server\s+\w+ [\d.]+ ms", figures)  # from Server-Timing
        pairs = expected @ expected.T - 2 * np.eye(len(texts))
        closest = sorted(np.unravel_index(pairs.argmax(), pairs.shape))
        assert (
            f"Most alike: {closest[0] + 1} and {closest[1] + 1} (" in visit.page.locator("#matrix-about").inner_text()
        )
        expect(visit.page.locator("#status")).to_contain_text(f"Done: {len(texts)} vectors")
        assert visit.error_statuses == []


@pytest.mark.parametrize("texts", [None, ["a cat", "a dog"], ["same words", "same words", "same words"]])
def test_map_is_a_pca(browser: Browser, stack: Stack, vectors: Any, texts: list[str] | None) -> None:
    with model_page(browser, stack) as visit:
        if texts:
            visit.write(*texts)
        expected = vectors(visit.texts())
        visit.run()
        points = visit.page.locator("#map .point").all()
        actual = np.array([[float(point.get_attribute(f"data-{axis}") or "") for axis in "xy"] for point in points])
        caption = visit.page.locator("#map-about").inner_text()
    axes, sizes, _ = np.linalg.svd(expected - expected.mean(0))
    coordinates = axes[:, :2] * sizes[:2]
    for k in range(2):
        sign = 1 if actual[:, k] @ coordinates[:, k] >= 0 else -1
        np.testing.assert_allclose(sign * actual[:, k], coordinates[:, k], atol=2e-3 if texts else 1e-4)
    total = (sizes**2).sum()
    share = 100 * (sizes[:2] ** 2).sum() / total if total > 1e-6 else 0
    assert abs(float(re.findall(r"([\d.]+) %", caption)[0]) - share) <= 0.51


def test_shown_command_returns_the_same_vectors_in_a_shell(browser: Browser, stack: Stack, vectors: Any) -> None:
    with model_page(browser, stack) as visit:
        visit.write(AWKWARD, "a plain one")
        response = visit.run()
        command = visit.page.locator("#curl").text_content() or ""
        assert visit.page.locator("#bold").count() == 0  # the text is escaped
    from_shell = json.loads(subprocess.check_output(["bash", "-c", command], stderr=subprocess.DEVNULL))
    rows = [[item["embedding"] for item in body["data"]] for body in (response, from_shell)]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    np.testing.assert_allclose(rows[1], vectors([AWKWARD, "a plain one"]), atol=2e-5)


def test_command_is_copied(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.run()
        visit.page.click("#copy")
        expect(visit.page.locator("#status")).to_have_text("The command is copied.")
        assert visit.page.evaluate("navigator.clipboard.readText()") == visit.page.locator("#curl").text_content()


def test_empty_row_shows_an_error_and_the_others_are_drawn(browser: Browser, stack: Stack, vectors: Any) -> None:
    with model_page(browser, stack) as visit:
        visit.write("a cat", " ", "a dog")
        visit.run()
        rows = visit.page.locator("#rows li")
        expect(rows.nth(1).locator(".error")).to_have_text(re.compile("cannot be empty"))
        expect(rows.nth(1).locator("textarea")).to_have_attribute("aria-invalid", "true")
        expect(rows.nth(0).locator(".error")).to_be_hidden()
        expected = vectors(["a cat", "a dog"])
        np.testing.assert_allclose(visit.numbers(), expected @ expected.T, atol=HALF_A_DIGIT)
        assert [text.split()[0] for text in visit.page.locator(".heat tbody th").all_inner_texts()] == ["1", "3"]
        expect(visit.page.locator("#status")).to_contain_text("1 input could not be embedded")
        rows.nth(1).locator("textarea").fill("a horse")
        expect(rows.nth(1).locator(".error")).to_be_hidden()
        visit.run()
        assert visit.numbers().shape == (3, 3)


def test_token_counts_and_truncation_are_shown(browser: Browser, stack: Stack, network: SentenceTransformer) -> None:
    texts = ["a cat", "many words and more of them " * 60]
    counts = [len(network.tokenizer(text)["input_ids"]) for text in texts]
    assert counts[1] > network.max_seq_length
    with model_page(browser, stack) as visit:
        visit.write(*texts)
        visit.run()
        cells = [row.locator("td").all_inner_texts() for row in visit.page.locator("#tokens tbody tr").all()]
        limit = network.max_seq_length
        assert cells == [[str(counts[0]), "none"], [str(limit), f"{counts[1] - limit:,} cut off"]]


def test_rejected_request_is_an_alert(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack, "gme_tiny") as visit:
        visit.page.fill("#dimensions", "4096")
        visit.run()
        expect(visit.page.get_by_role("alert")).to_contain_text("dimensions are greater than")
        expect(visit.page.locator("#result")).to_be_hidden()
        assert visit.error_statuses == [400]
        visit.page.fill("#dimensions", "24")
        visit.run()
        expect(visit.page.get_by_role("alert")).to_be_empty()
        assert "× 24" in visit.page.locator("#figures").inner_text()


def test_model_that_is_not_ready_shows_its_reason(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack) as visit:
        option = visit.page.locator("#model option[value=bge]")
        expect(option).to_be_disabled()
        reason = requests.get(f"{stack.url}/v1/models/bge", timeout=30).json()["reason"]
        assert reason
        assert "not ready" in (option.text_content() or "")
        visit.page.click("#waiting summary")
        expect(visit.page.locator("#waiting li")).to_have_text(f"bge: {reason}")


def test_only_matryoshka_dimensions_are_offered(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack) as visit:
        sizes = visit.page.locator("#dimensions option")
        expect(sizes).to_have_text(["384 (all)"])
        visit.page.select_option("#model", "bge_tiny")
        expect(sizes).to_have_text(["60 (all)", "40", "20"])
        visit.page.select_option("#dimensions", "20")
        response = visit.run()
        assert {len(item["embedding"]) for item in response["data"]} == {20}
        rows = np.array([item["embedding"] for item in response["data"]])
        np.testing.assert_allclose(visit.numbers(), rows @ rows.T, atol=HALF_A_DIGIT)


def test_images_are_shown_and_sent_unchanged(browser: Browser, stack: Stack) -> None:
    files = [png_image(0), png_image(1)]
    with model_page(browser, stack) as visit:
        expect(visit.page.locator("#drop")).to_be_hidden()
        visit.page.select_option("#model", "gme_tiny")
        visit.write("a cat")
        uploads = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": file} for i, file in enumerate(files)]
        notes = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"}
        visit.page.set_input_files("#files", [*uploads, notes])  # type: ignore[list-item]
        expect(visit.page.get_by_role("alert")).to_contain_text("notes.txt")
        expect(visit.page.locator("#rows img")).to_have_count(2)
        visit.page.get_by_label("Text with image 3").fill("a dog")
        visit.run()
        sent = visit.sent[-1]["input"]
        uris = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
        assert sent == [{"text": "a cat"}, {"image": uris[0]}, {"text": "a dog", "image": uris[1]}]
        assert visit.numbers().shape == (3, 3)
        expect(visit.page.locator("#map image")).to_have_count(2)
        command = visit.page.locator("#curl").text_content() or ""
        assert uris[0][:60] not in command
        assert "BASE64 OF 0.png" in command
        expect(visit.page.locator("#curl-about")).to_contain_text("Images are left out")


def test_images_are_dropped(browser: Browser, stack: Stack) -> None:
    script = """async (bytes) => {
      const held = new DataTransfer();
      held.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
      document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: held, bubbles: true }));
    }"""
    with model_page(browser, stack, "gme_tiny") as visit:
        visit.page.evaluate(script, list(png_image(2)))
        expect(visit.page.get_by_alt_text("dropped.png")).to_be_visible()


def test_instruction_is_sent(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack) as visit:
        expect(visit.page.locator("#prompt")).to_be_hidden()  # minilm supports no instructions
        visit.page.select_option("#model", "gme_tiny")
        visit.page.select_option("#prompt", "own")
        visit.page.fill("#instruction", "Find a cat")
        visit.run()
        assert visit.sent[-1]["instruction"] == "Find a cat"
        expect(visit.page.locator("#tokens tbody tr").first).to_contain_text("with the instruction: Find a cat")
        assert "Find a cat" in (visit.page.locator("#curl").text_content() or "")


def test_prompt_is_selected_by_name(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack, "bge_tiny") as visit:
        expect(visit.page.locator("#prompt option")).to_have_text(
            ["Default", "query", "document", "None", "Your own instruction"]
        )
        rows = []
        for name in ("query", "None"):
            visit.page.select_option("#prompt", label=name)
            rows.append([item["embedding"] for item in visit.run()["data"]])
        assert [sent["prompt_name"] for sent in visit.sent] == ["query", ""]
        assert not np.allclose(*rows, atol=1e-2)


def test_pasted_lines_become_rows(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.write("first ", "last")
        visit.page.evaluate("navigator.clipboard.writeText('one\\r\\n\\n  two\\nthree')")
        visit.page.locator("#rows textarea").first.focus()
        visit.page.keyboard.press("End")
        visit.page.keyboard.press("Control+v")
        expect(visit.page.locator("#rows li")).to_have_count(4)
        assert visit.texts() == ["first one", "  two", "three", "last"]
        expect(visit.page.locator("#status")).to_have_text("Pasted 3 lines: 4 inputs now.")


def test_rows_beyond_100_are_dropped_with_an_alert(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.page.evaluate(
            "navigator.clipboard.writeText(Array.from({length: 150}, (_, i) => `line ${i}`).join('\\n'))"
        )
        visit.page.locator("#rows textarea").last.focus()
        visit.page.keyboard.press("Control+v")
        expect(visit.page.locator("#rows li")).to_have_count(100)
        expect(visit.page.get_by_role("alert")).to_contain_text("100 inputs at most")
        visit.run()
        assert visit.numbers().shape == (100, 100)
        assert visit.overflow() <= 0


def test_page_works_with_the_keyboard_alone(browser: Browser, stack: Stack) -> None:
    """Send Tab from the first field to the result; the focus must be visible everywhere."""
    is_focus_visible = "e => getComputedStyle(e.closest('.drop') ?? e).outlineStyle !== 'none'"
    with model_page(browser, stack) as visit:
        page = visit.page
        page.locator("#model").focus()
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            assert focused.evaluate(is_focus_visible), focused.evaluate("e => e.outerHTML")
            if focused.get_attribute("id") == "run":
                break
        page.keyboard.press("Enter")
        expect(page.locator(".heat")).to_be_visible()
        reached = set()
        for _ in range(3):
            page.keyboard.press("Tab")
            reached.add(page.locator(":focus").get_attribute("id"))
        assert reached == {"matrix", "copy", "curl"}


def test_rows_are_edited_by_keyboard(browser: Browser, stack: Stack) -> None:
    with model_page(browser, stack) as visit:
        page = visit.page
        visit.write("one")
        page.locator("#rows textarea").focus()
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        page.keyboard.type("two")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("lines")
        assert visit.texts() == ["one", "two\nlines"]
        page.get_by_label("Remove text 1").press("Enter")
        assert visit.texts() == ["two\nlines"]
        expect(page.get_by_label("Remove text 1")).to_be_focused()
        with page.expect_response("**/v1/embeddings"):
            page.keyboard.press("Control+Enter")
        expect(page.locator("#matrix-about")).to_contain_text("no second vector")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(browser: Browser, stack: Stack, scheme: str, width: int) -> None:
    size = {"width": width, "height": 844}
    with model_page(browser, stack, "gme_tiny", color_scheme=scheme, viewport=size) as visit:
        assert Axe().run(visit.page).violations_count == 0
        assert visit.overflow() <= 0
        visit.page.locator("#rows textarea").first.fill("")
        visit.page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png_image(3)})
        expect(visit.page.locator("#rows img")).to_be_visible()
        visit.run()
        expect(visit.page.locator(".heat")).to_be_visible()
        expect(visit.page.locator("#rows .error").first).to_be_visible()
        report = Axe().run(visit.page)
        assert report.violations_count == 0, report.generate_report()
        assert visit.overflow() <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_digits_are_readable_on_every_color_of_the_scale(browser: Browser, stack: Stack, scheme: str) -> None:
    """Measure the contrast as in WCAG, over the whole scale and not only at the examples."""
    with model_page(browser, stack, color_scheme=scheme) as visit:
        visit.run()
        visit.page.evaluate("""() => {
          const scale = Array.from({ length: 201 }, (_, i) => heatCell(i / 200, i / 200));
          document.querySelector(".heat tbody").replaceChildren(...scale.map((cell) => {
            const row = document.createElement("tr");
            row.append(cell);
            return row;
          }));
          document.getElementById("matrix").style.maxHeight = "none";
        }""")
        options = {"runOnly": ["color-contrast"], "resultTypes": ["violations", "passes", "incomplete"]}
        report = Axe().run(visit.page, context=".heat tbody", options=options).response
    assert [node["html"] for rule in report["violations"] + report["incomplete"] for node in rule["nodes"]] == []
    assert sum(len(rule["nodes"]) for rule in report["passes"]) == 201


def test_api_key_is_requested_and_not_shown(browser: Browser, tmp_path: Path) -> None:
    server = Stack(tmp_path / "log", "--model=minilm", "--api-key=open sesame")
    try:
        with visiting(browser, server.url) as visit:
            expect(visit.page.get_by_label("API key")).to_be_focused()
            expect(visit.page.get_by_role("alert")).to_contain_text("API key")
            visit.page.keyboard.type("open sesame")
            visit.page.keyboard.press("Enter")
            expect(visit.page.locator(".heat")).to_be_visible()
            assert visit.error_statuses == [401]
            command = visit.page.locator("#curl").text_content() or ""
            assert "sesame" not in command
            environment = {"TRITON_EMBED_API_KEY": "open sesame", "PATH": "/usr/bin:/bin"}
            printed = subprocess.check_output(["bash", "-c", command], stderr=subprocess.DEVNULL, env=environment)
            assert len(json.loads(printed)["data"]) == len(visit.texts())
        with visiting(browser, server.url, "/docs") as visit:  # its files need no key
            expect(visit.page.locator(".opblock").first).to_be_visible()
    finally:
        server.stop()


def test_docs_show_every_operation_and_run_one(browser: Browser, stack: Stack) -> None:
    paths = requests.get(f"{stack.url}/openapi.json", timeout=30).json()["paths"]
    with visiting(browser, stack.url, "/docs") as visit:
        page = visit.page
        expect(page.locator(".opblock").first).to_be_visible()
        shown = {path.replace("\u200b", "") for path in page.locator(".opblock-summary-path").all_inner_texts()}
        assert shown == set(paths)
        assert not {"/", "/docs"} & shown
        block = page.locator(".opblock", has=page.locator("[data-path='/v1/models']"))
        block.locator(".opblock-summary-control").click()
        block.locator(".try-out__btn").click()
        block.locator(".execute").click()
        expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
        expect(block.locator(".live-responses-table .response-col_description").last).to_contain_text("minilm")
        assert visit.error_statuses == []


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"])
def test_pages_have_security_and_caching_headers(stack: Stack, path: str) -> None:
    response = requests.get(stack.url + path, timeout=30)
    assert response.status_code == 200
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    allowed = {source for sources in policy.values() for source in sources.split()}
    assert {source for source in allowed if not source.startswith("'sha256-")} <= {"'none'", "'self'", "data:"}
    if "html" in response.headers["content-type"]:
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert "http://" not in re.sub(r"xmlns=\S+|\"http://www.w3.org/2000/svg\"", "", response.text)
        assert "https://" not in response.text
    again = requests.get(stack.url + path, headers={"If-None-Match": response.headers["etag"]}, timeout=30)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", response.headers["etag"])
    assert requests.get(stack.url + path, headers={"If-None-Match": '"other"'}, timeout=30).status_code == 200
