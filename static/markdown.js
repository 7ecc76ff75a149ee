// Markdown: text to elements in linear time. Nothing in it can load or run anything.

import { button, copy, el, span } from "./dom.js";
import { highlight } from "./highlight.js";

const FENCE = /^[ \t]*(`{3,}|~{3,})[ \t]*([^`]*)$/;
const ITEM = /^[ \t]*([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const HEADING = /^ *(#+)[ \t]+(.*)$/s;
const RULE = /^([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const COLUMNS = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/; // of a trimmed line
// what ends a paragraph
const BREAKS = /^ {0,3}(?:`{3}|~{3}|#{1,6}[ \t]|>)|^[ \t]*(?:[-*+]|1[.)])[ \t]+\S/;

const isOrdered = (line) => /^[ \t]*\d/.test(line);
const indentOf = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;
const dedent = (line, width) => line.slice(Math.min(width, /^[ \t]*/.exec(line)[0].length));
const closes = (line, fence) =>
  line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
const cellsOf = (line) =>
  line
    .trim()
    .replace(/^\||\|$/g, "")
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim());

// Blocks whose source is unchanged keep their elements: a growing reply costs only its last block.
export function drawMarkdown(target, text) {
  const old = target.blocks ?? [];
  let level = 1; // the page's own heading is the h1, and no level below it is left out
  target.blocks = blocksOf(text.split(/\r\n?|\n/)).map((block, at) => {
    if (block.kind === "heading") {
      level = Math.min(6, level + 1, HEADING.exec(block.lines[0])[1].length + 1);
      block.level = level;
    }
    const source = `${block.kind}${block.level}${block.lines.join("\n")}`;
    if (old[at]?.source === source) return old[at];
    const node = drawBlock(block, 0);
    if (old[at]) old[at].node.replaceWith(node);
    else target.append(node);
    return { source, node };
  });
  for (const { node } of old.slice(target.blocks.length)) node.remove();
}

function blocksOf(lines) {
  const found = [];
  const isTable = (at) =>
    lines[at].includes("|") &&
    COLUMNS.test(lines[at + 1]?.trim() ?? "") &&
    cellsOf(lines[at]).length === cellsOf(lines[at + 1]).length;
  for (let start = 0, end; start < lines.length; start = end) {
    const line = lines[start];
    const take = (kind, stop) => {
      while (end < lines.length && !stop(lines[end], end)) end += 1;
      found.push({ kind, lines: lines.slice(start, end) });
    };
    end = start + 1;
    if (!line.trim()) continue;
    if (FENCE.test(line)) {
      // one that isn't closed goes on to the end, as while it streams
      const [, fence] = FENCE.exec(line);
      take("code", (_, at) => at > start + 1 && closes(lines[at - 1], fence));
    } else if (/^ {0,3}#{1,6}[ \t]/.test(line)) take("heading", () => true);
    else if (RULE.test(line.trim())) take("rule", () => true);
    else if (/^ {0,3}>/.test(line)) take("quote", (one) => !/^ {0,3}>/.test(one));
    else if (ITEM.test(line)) {
      const goesOn = (one) =>
        ITEM.test(one) && isOrdered(one) === isOrdered(line) && !RULE.test(one.trim());
      const indent = indentOf(line);
      take(
        "list",
        (one) =>
          one.trim() && indentOf(one) < indent + 2 && !(indentOf(one) >= indent && goesOn(one)),
      );
    } else if (isTable(start)) take("table", (one) => !one.includes("|"));
    else
      take(
        "text",
        (one, at) => !one.trim() || BREAKS.test(one) || RULE.test(one.trim()) || isTable(at),
      );
  }
  return found;
}

function drawBlock({ kind, lines, level }, depth) {
  const [first] = lines;
  const fill = (node, inner) => {
    // deeper than this it stays text: the depth is a factor of the time
    if (depth < 10) node.append(...blocksOf(inner).map((block) => drawBlock(block, depth + 1)));
    else node.textContent = inner.join("\n");
    return node;
  };
  if (kind === "code") return drawCode(lines);
  if (kind === "rule") return el("hr");
  if (kind === "table") return drawTable(lines);
  if (kind === "text") return inline(el("p"), lines.map((line) => line.trim()).join("\n"));
  if (kind === "quote")
    return fill(
      el("blockquote"),
      lines.map((line) => line.replace(/^ {0,3}> ?/, "")),
    );
  if (kind === "heading") {
    const text = HEADING.exec(first)[2]
      .trimEnd()
      .replace(/(^| )#+$/, "");
    if (level) return inline(el(`h${level}`), text);
    return el("p", {}, inline(el("strong"), text)); // inside a list or a quote it heads nothing
  }
  const items = [];
  let width;
  for (const line of lines) {
    const marker = indentOf(line) < indentOf(first) + 2 && ITEM.exec(line);
    if (marker) {
      width = /^[ \t]*/.exec(line)[0].length + marker[1].length + 1;
      items.push([line.slice(marker[0].length)]);
    } else items.at(-1).push(dedent(line, width));
  }
  const list = isOrdered(first) ? el("ol", { start: Number.parseInt(first, 10) }) : el("ul");
  list.append(...items.map((item) => fill(el("li"), item)));
  return list;
}

function drawCode([first, ...lines]) {
  const [, fence, language] = FENCE.exec(first);
  if (lines.length && closes(lines.at(-1), fence)) lines.pop();
  const text = lines.map((line) => dedent(line, indentOf(first))).join("\n");
  const bar = [
    span(language.trim() || "text", "wide soft"),
    button("Copy", (event) => copy(event.target, text)),
  ];
  const code = el("code", {}, ...highlight(text, language.trim().toLowerCase()));
  const pre = el("pre", { tabIndex: 0, dir: "ltr", role: "group", ariaLabel: "Code" }, code);
  return el("div", { className: "code" }, el("div", { className: "row" }, ...bar), pre);
}

function drawTable([head, columns, ...body]) {
  const align = cellsOf(columns).map((one) =>
    !one.endsWith(":") ? "left" : one.startsWith(":") ? "center" : "right",
  );
  const row = (tag, line) =>
    el(
      "tr",
      {},
      ...cellsOf(line)
        .slice(0, align.length)
        .map((text, at) => {
          const cell = inline(
            el(tag),
            text.replaceAll("\\|", "|").replace(/<br[ \t]*\/?>/gi, "\n"),
          );
          cell.dataset.align = align[at];
          return cell;
        }),
    );
  const rest = el("tbody", {}, ...body.map((line) => row("td", line)));
  const table = el("table", {}, el("thead", {}, row("th", head)), rest);
  return el("div", { className: "table", tabIndex: 0, role: "group", ariaLabel: "Table" }, table);
}

// The beginning of a formula, an escape, code, emphasis, the beginning and the middle of a link, an
// address, or a line's end.
const TOKEN = new RegExp(
  [
    /(\\[([]|\$\$)/,
    /\\([!-/:-@[-`{-~])/,
    /(`+)/,
    /(\*+|_+|~~)/,
    /(!?\[)/,
    /(\]\()/,
    /<((?:https?:\/\/|mailto:)[^\s<>]*)>/,
    /(https?:\/\/[^\s<>"'`*|)\]]+)/,
    /\n/,
  ]
    .map((one) => one.source)
    .join("|"),
  "gi",
);
const TARGET = /[ \t]*<?((?:[^\s<>()]|\([^\s<>()]*\))*)>?(?:[ \t]+"[^"]*")?[ \t]*\)/y;
const FORMULA_ENDS = { "\\(": "\\)", "\\[": "\\]", $$: "$$" };
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

// One pass pairs the tokens, a second one builds. Openers wait on a stack of at most 32, so finding
// the partner of an ending takes constant time, however many openers never end.
function inline(parent, text) {
  const tokens = [],
    stack = [],
    unclosed = new Set();
  const add = (token) => {
    tokens.push(token);
    return token;
  };
  const pair = (token, ...markers) => {
    const at = stack.findLastIndex((opener) => markers.includes(opener.marker));
    if (at < 0) return null;
    token.ends = stack[at].begins = true;
    return stack.splice(at)[0]; // those in between have no partner and stay text
  };
  const wait = (token) => {
    if (stack.push(token) > 32) stack.shift();
  };
  let at = (TOKEN.lastIndex = 0);
  for (let match; (match = TOKEN.exec(text)); TOKEN.lastIndex = at) {
    const [whole, formula, escaped, ticks, marks, bracket, middle, angle, bare] = match;
    add({ text: text.slice(at, match.index) });
    at = match.index + whole.length;
    if (formula) {
      // kept as it was written: without its backslashes nobody could read it
      const end = unclosed.has(formula) ? -1 : text.indexOf(FORMULA_ENDS[formula], at);
      if (end < 0) unclosed.add(formula);
      if (end >= 0) at = end + 2;
      const plain = formula === "$$" ? formula : formula[1];
      add(end < 0 ? { text: plain } : { node: span(text.slice(match.index, at), "formula") });
    } else if (escaped) add({ text: escaped });
    else if (ticks) {
      const end = unclosed.has(ticks) ? -1 : text.indexOf(ticks, at);
      if (end < 0) unclosed.add(ticks); // looking for it once is enough
      if (end < 0) add({ text: ticks });
      else
        add({
          node: el("code", { textContent: text.slice(at, end).replaceAll("\n", " ").trim() }),
        });
      if (end >= 0) at = end + ticks.length;
    } else if (marks) {
      const [before, after] = [text[match.index - 1] ?? " ", text[at] ?? " "];
      const inWord =
        marks[0] === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
      const parts = marks.length === 3 ? [marks.slice(1), marks[0]] : [marks];
      // *** ends the inner one first
      if (parts[1] && stack.at(-1)?.marker === parts[1]) parts.reverse();
      for (const part of parts) {
        const token = add({ text: part, marker: part });
        if (inWord || !(part in TAGS) || (/\S/.test(before) && pair(token, part))) continue;
        if (/\S/.test(after)) wait(token);
      }
    } else if (bracket) wait(add({ text: bracket, marker: bracket }));
    else if (middle) {
      TARGET.lastIndex = at;
      const token = add({ text: middle });
      const target = TARGET.exec(text);
      const opener = target && pair(token, "[", "![");
      if (opener) {
        opener.href = target[1];
        at = TARGET.lastIndex;
        // there are no links in links
        for (const one of stack) if (one.marker === "[") one.marker = "";
      }
    } else if (angle || bare) {
      const url = angle ?? bare.replace(/[.,;:!?]+$/, "");
      add({ node: linkTo(url, url) });
      if (bare) at = match.index + url.length;
    } else add({ node: el("br") });
  }
  add({ text: text.slice(at) });
  let node = parent;
  for (const { text: plain, node: ready, marker, begins, ends, href } of tokens) {
    if (ends) node = node.parentNode;
    else if (!begins) node.append(ready ?? plain);
    else {
      node.append(TAGS[marker] ? el(TAGS[marker]) : linkTo(href, plain === "![" ? "Image: " : ""));
      node = node.lastChild;
    }
  }
  return parent;
}

// Only these schemes: javascript: or data: stay text, and a relative address would lead into this
// service.
function linkTo(href, text) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(href)) return span(text);
  return el("a", {
    href,
    rel: "noopener noreferrer nofollow",
    target: "_blank",
    textContent: text,
  });
}
