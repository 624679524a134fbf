"""`python -m autocompress` is `python -m autocompress.study`."""

from autocompress.study import main

main()
