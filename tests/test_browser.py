"In a real browser: a system's notebook in JupyterLab, and the explorer of digits."
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from puzzle_research.core.config import root

pytest.importorskip('playwright', reason="needs the extra `browser`")

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='needs Chromium (Debian: chromium)')]
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync',
             '--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream']
# of JupyterLab's own model, as the page holds it
CELLS = 'jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === "code")'
SET = f"""([name, value]) => {CELLS}.forEach(cell => {{
    const source = cell.model.sharedModel, line = new RegExp(`^${{name}}:(\\\\w+) = \\\\S+`, 'm');
    source.setSource(source.getSource().replace(line, `${{name}}:$1 = ${{value}}`));
}})"""
OUTPUTS = f"""() => {CELLS}.flatMap(cell => cell.model.outputs.toJSON())"""
SAID = f'{CELLS}.filter(cell => cell.model.sharedModel.getSource().trim())'
DONE = f"""() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle' &&
    {SAID}.every(cell => cell.model.executionCount)"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The server that `make lab` starts, on loopback, over a copy of the notebooks. Yields its address."
    folder, port = tmp_path_factory.mktemp('lab'), free_port()
    shutil.copytree(root()/'nbs', folder/'nbs')
    env = os.environ | dict(PUZZLE_ROOT=str(root()), PUZZLE_RUNS=str(folder/'runs'))
    command = [sys.executable, '-m', 'jupyter', 'lab', 'nbs', '--no-browser', '--allow-root',
               f'--port={port}', '--IdentityProvider.token=', '--expose-app-in-browser']
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f'{address}/api', timeout=1)
                break
            except OSError:
                time.sleep(.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(300_000)
        yield page
        browser.close()


def open_notebook(page, lab, name):
    "Open it and wait for its kernel."
    page.goto(f'{lab}/lab/tree/{name}?reset')
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel')
    page.wait_for_function(f'() => {CELLS}.length > 3')


def run_all(page, minutes:float):
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(DONE, timeout=60_000*minutes)
    outputs = page.evaluate(OUTPUTS)
    errors = [o['evalue'] for o in outputs if o['output_type'] == 'error']
    assert not errors, errors
    return outputs


def test_a_system_runs_in_jupyterlab(page, lab):
    open_notebook(page, lab, '05_ternary_vae.ipynb')
    page.evaluate(SET, ['budget', "'test'"])
    page.evaluate(SET, ['data', "'bundled'"])
    outputs = run_all(page, 20)
    assert "'test'" in page.evaluate(f'() => {CELLS}.map(cell => cell.model.sharedModel.getSource()).join()')
    figures = [o for o in outputs if 'image/png' in o.get('data', {})]
    assert len(figures) >= 3
    page.evaluate("() => { jupyterapp.commands.execute('notebook:move-cursor-down') }")
    page.locator('.jp-RenderedImage img').last.scroll_into_view_if_needed()
    assert page.locator('.jp-RenderedImage img').last.evaluate('image => image.naturalWidth') > 100


def changes(page, element, act):
    "Whether what an image shows is another picture after `act`."
    before = element.get_attribute('src')
    act()
    page.wait_for_function('([image, old]) => image.src !== old', arg=[element.element_handle(), before])


def test_the_explorer_answers(page, lab, tmp_path):
    open_notebook(page, lab, 'guides/03_explore.ipynb')
    run_all(page, 20)
    puzzles, decoded = page.locator('.recipe-grid canvas.puzzle'), page.locator('.recipe-grid img')
    puzzles.first.scroll_into_view_if_needed()
    changes(page, decoded.first, lambda: puzzles.first.click(position=dict(x=40, y=40)))
    changes(page, decoded.first, lambda: page.keyboard.press('7'))
    page.screenshot(path=os.environ.get('PUZZLE_SCREENSHOT', tmp_path/'explore.png'))
    changes(page, decoded.last, lambda: page.locator('button.record').click())
    field = page.locator('.jp-OutputArea-output textarea')
    field.fill('Colourless green ideas sleep furiously.')
    field.press('Tab')
    page.locator('.recipe-stream pre', has_text='green ideas').wait_for()
