"""The paper's figures and tables as runnable studies, a module each; `catalogue` lists them."""
