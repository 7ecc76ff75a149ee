"use strict";

// "Try it out" goes to where this page is, also behind a proxy that strips a prefix.
async function show() {
  const spec = await (await fetch("openapi.json")).json();
  spec.servers = [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }];
  SwaggerUIBundle({ spec, dom_id: "#docs", deepLinking: true });
}

show();
