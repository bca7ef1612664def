"""One module a page; `ui.app` lists them."""
