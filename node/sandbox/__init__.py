"""What keeps an engine from the machine that it runs on: the process confines itself, before it loads anything of others."""
