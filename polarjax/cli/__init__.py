"""The `polarjax` command: one file a verb, imported only when the verb is called."""
