"""A daemon that speaks other versions of the protocol: `python speaking.py OLDEST NEWEST node|coordinator [ARGUMENT...]`."""

import sys

from potluck.wire import births

if __name__ == "__main__":
    oldest, newest, daemon = sys.argv[1:4]
    del sys.argv[1:4]
    # before the daemons are imported: they take this name from here
    births.OURS = births.Versions(int(oldest), int(newest))
    if daemon == "node":
        from node.__main__ import main
    else:
        from coordinator.__main__ import main
    main()
