// Small helpers to build and change the document. Text stays text: nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export const button = (textContent, onclick, rest) =>
  el("button", { type: "button", textContent, onclick, ...rest });

export const span = (textContent = "", className = "") => el("span", { textContent, className });

// Makes `wanted` the children of `parent`. Those in their place aren't touched: moving an element
// loses its focus.
export function place(parent, wanted) {
  const keep = new Set(wanted);
  for (const child of [...parent.childNodes]) if (!keep.has(child)) child.remove();
  let at = parent.firstChild;
  for (const node of wanted) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
}

// Copies `text` and says so on the button: in its text, or in its name if it is an icon.
export async function copy(origin, text) {
  try {
    await navigator.clipboard.writeText(text); // only in secure contexts, and only if allowed
  } catch {
    const area = el("textarea", { value: text, className: "unseen" });
    origin.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    origin.focus();
  }
  const part = origin.ariaLabel ? "ariaLabel" : "textContent";
  origin[part] = "Copied";
  origin.classList.add("done");
  setTimeout(() => {
    origin[part] = "Copy";
    origin.classList.remove("done");
  }, 1500);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/markdown" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
