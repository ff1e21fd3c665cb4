"""A headless chromium for the tests of pages; where there is none, they are skipped and say so."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def headless():
  """A selenium driver that keeps the browser's messages."""
  paths = shutil.which('chromium'), shutil.which('chromedriver')
  if not all(paths):
    pytest.skip('no chromium: apt-get install chromium chromium-driver')
  webdriver = pytest.importorskip('selenium.webdriver')
  options = webdriver.ChromeOptions()
  options.binary_location = paths[0]
  for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,900'):
    options.add_argument(argument)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
  try:
    yield driver
  finally:
    driver.quit()
