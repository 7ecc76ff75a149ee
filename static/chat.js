// The page: the reference client of docs/protocol.md. State, protocol, rendering, wiring.

import { $, button, copy, download, el, place, span } from "./dom.js";
import { drawMarkdown } from "./markdown.js";

// ---- State: what is known, and how it grows ----

const state = {
  user: "",
  token: "",
  chats: new Map(), // id -> the service's chat and what is known of its messages, see chatOf()
  gone: new Set(), // deleted chats: a late answer must not bring one back
  nextPage: null, // address of the next page of the list of chats
  open: null, // id of the open chat; null while a new one is begun
  draft: newId(), // stands for the chat that the first message of a new one will make
  outbox: [], // what has no echo yet: { id, chat_id, draft, content, replaces, error, sentOn }
  socket: null,
  connection: 0, // the current connection and its number
  stuck: true, // the conversation is at its bottom and follows it
};

// randomUUID exists only in secure contexts, and this page also runs on http:// in a local network.
function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}

// loadedOn: the connection on which the newest page was loaded, on any other it may be out of date.
// seenTo: the last id that was known without a gap when the connection was lost.
function chatOf(id) {
  if (!state.chats.has(id)) {
    const none = {
      title: "",
      updated_at: "",
      activity: "",
      unread: false,
      hasMore: false,
      loadedOn: 0,
      seenTo: 0,
    };
    state.chats.set(id, { id, ...none, messages: new Map() });
  }
  return state.chats.get(id);
}

const sorted = (chat) => [...chat.messages.values()].sort((a, b) => a.id - b.id);
const ended = (message) => message.status !== "streaming";
const isLive = (reply) => !ended(reply) && reply.live === state.connection;

function mergeChat({ messages, has_more, ...fields }) {
  const chat = chatOf(fields.id);
  if (fields.updated_at >= chat.updated_at) Object.assign(chat, fields);
  if (fields.updated_at > chat.activity) chat.activity = fields.updated_at;
}

// Idempotent, and the order of arrival doesn't matter: an ending is final, and a running text
// belongs to the socket, because a copy read by HTTP may be behind its tokens or ahead of them.
// Returns whether this is a reply's ending.
function mergeMessage(message) {
  const chat = chatOf(message.chat_id);
  const known = chat.messages.get(message.id) ?? { content: "", status: "streaming" };
  const ends = message.is_ai && ended(message) && !ended(known);
  if (!message.is_ai || ended(message) || !ended(known)) {
    const keep =
      !ended(message) && (isLive(known) || known.content.length > message.content.length);
    const { content, reasoning } = known;
    chat.messages.set(message.id, Object.assign(known, message, keep && { content, reasoning }));
  }
  if (message.timestamp > chat.activity) chat.activity = message.timestamp;
  if (!message.is_ai && message.client_msg_id) delivered(message);
  return ends;
}

// A frame can be the first that is heard of a reply: then this makes its placeholder.
function replyOf({ chat_id, message_id: id, task_id }) {
  const chat = chatOf(chat_id);
  if (!chat.messages.has(id)) {
    const reply_to =
      sorted(chat).findLast((message) => !message.is_ai && message.task_id === task_id)?.id ?? null;
    chat.messages.set(id, {
      id,
      chat_id,
      task_id,
      reply_to,
      content: "",
      is_ai: true,
      status: "streaming",
    });
  }
  return chat.messages.get(id);
}

function forget(chatId) {
  state.gone.add(chatId);
  state.chats.delete(chatId);
  setOutbox(state.outbox.filter((entry) => entry.chat_id !== chatId));
  keepDraft(chatId, "");
  if (state.open === chatId) location.hash = "";
  changed("list");
}

// In sessionStorage, so that it outlives a reload: each tab sends again only what it has sent
// itself.
function setOutbox(outbox) {
  state.outbox = outbox;
  sessionStorage[`outbox ${state.user}`] = JSON.stringify(outbox);
  changed("chat");
}

function delivered({ client_msg_id, chat_id }) {
  const entry = state.outbox.find(({ id }) => id === client_msg_id);
  if (!entry) return;
  if (entry.chat_id === null) {
    // its chat exists now: what was written behind it belongs there too
    for (const other of state.outbox) if (other.draft === entry.draft) other.chat_id = chat_id;
    if (state.open === null && state.draft === entry.draft) {
      enterMade(chat_id);
    }
    if (state.draft === entry.draft) state.draft = newId();
  }
  setOutbox(state.outbox.filter((other) => other !== entry));
  flush();
}

// The chat that was new has an id now; what is being written goes along.
function enterMade(chatId) {
  keepDraft(chatId, draftOf(null));
  keepDraft(null, "");
  history.replaceState(null, "", `#${chatId}`);
  openChat().catch(unloaded);
}

// What is being written belongs to its chat, or to the new one (null), and outlives a reload.
const draftsKey = () => `drafts ${state.user}`;
const drafts = () => JSON.parse(sessionStorage[draftsKey()] ?? "{}");
const draftOf = (chatId) => drafts()[chatId ?? "new"] ?? "";

function keepDraft(chatId, text) {
  const { [chatId ?? "new"]: _, ...others } = drafts();
  sessionStorage[draftsKey()] = JSON.stringify(
    text ? { ...others, [chatId ?? "new"]: text } : others,
  );
}

// ---- Protocol client: the service's frames and endpoints ----

// Every frame comes through here, whichever chat it is about.
function receive(frame) {
  const { type, message } = frame;
  const chatId = frame.chat_id ?? message?.chat_id ?? frame.chat?.id;
  if (type === "pong" || state.gone.has(chatId)) return;
  let part = "chat"; // what has to be drawn anew
  if (type === "chat") mergeChat(frame.chat);
  else if (type === "chat_deleted") return forget(chatId);
  else if (type === "message") {
    if (mergeMessage(message)) announceEnd(message);
  } else if (type === "sync") {
    const reply = replyOf(frame);
    const { content, reasoning, seq } = frame;
    if (!ended(reply)) Object.assign(reply, { content, reasoning, seq, live: state.connection });
  } else if (type === "token") {
    const reply = replyOf(frame);
    // Without a sync on this connection its text begins here: what HTTP has shown of it is
    // replaced.
    if (!ended(reply) && !isLive(reply)) {
      Object.assign(reply, { content: "", reasoning: null, seq: 0, live: state.connection });
    }
    if (ended(reply) || frame.seq <= reply.seq) return;
    if (grow(reply, frame)) part = reply;
  } else if (type === "aborted") finish(frame, "aborted");
  else if (type === "error" && !frame.message_id) return refused(frame);
  else if (type === "error") finish(frame, frame.code === "interrupted" ? "interrupted" : "failed");
  else return; // a newer service may say more than this page knows
  changed(part);
  const chat = chatOf(chatId);
  const isNews = chatId !== state.open && !chat.unread && type !== "chat" && type !== "sync";
  if (isNews) chat.unread = true;
  if (isNews || part === "chat") changed("list");
  if (!chat.updated_at) {
    // a chat of a later page of the list: its new message has moved it to the first one
    chat.updated_at = "0";
    loadChats().catch(unloaded);
  }
}

// Adds a token's text. Returns whether no more has to be drawn than this text.
function grow(reply, { token, reasoning, seq }) {
  const before = [Boolean(reply.content), Boolean(reply.reasoning)].join();
  if (reasoning) reply.reasoning = (reply.reasoning ?? "") + reasoning;
  reply.content += token;
  reply.seq = seq;
  return before === [Boolean(reply.content), Boolean(reply.reasoning)].join();
}

function finish(frame, status) {
  const reply = { ...replyOf(frame), status, finish_reason: frame.code ?? null };
  if (mergeMessage(reply)) announceEnd(reply);
}

function refused({ client_msg_id, code, message, retry_after }) {
  const entry = state.outbox.find(({ id }) => id === client_msg_id);
  const reason = retry_after ? `${message} (again in ${retry_after} s)` : message;
  changed("chat");
  // not running: it ended while Stop was on its way
  if (!entry && code !== "not_running") notify(reason);
  if (!entry) return;
  entry.error = reason;
  if (code === "chat_not_found") Object.assign(entry, { chat_id: null, draft: state.draft });
  setOutbox(state.outbox);
  flush(); // what was written behind it may go now
}

async function api(method, path, body) {
  const headers = { "Content-Type": "application/json" };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  if (response.status === 401) signInAgain();
  const { detail = `The service answered ${response.status}.` } = await response
    .json()
    .catch(() => ({}));
  throw Object.assign(new Error(detail), { status: response.status });
}

const EXPIRED = "Your token isn't valid, or not any more.";
const userPath = (rest) => `api/users/${encodeURIComponent(state.user)}/${rest}`;

const PING_MS = 25_000,
  PONG_MS = 5000,
  HANDSHAKE_MS = 10_000;
let attempts = 0,
  openedAt = Infinity,
  retryTimer,
  deadTimer;

// A phone's socket dies without a word while it sleeps: whatever is heard within `ms` shows that it
// lives.
function expectLife(ms) {
  const { socket } = state;
  clearTimeout(deadTimer);
  deadTimer = setTimeout(() => {
    if (socket === state.socket) connect();
  }, ms);
}

function ping() {
  if (state.socket?.readyState !== WebSocket.OPEN) return;
  state.socket.send(JSON.stringify({ action: "ping" }));
  expectLife(PONG_MS);
}

function connect() {
  clearTimeout(retryTimer);
  clearTimeout(deadTimer);
  state.socket?.close(); // what it still says is ignored: it isn't state.socket any more
  for (const chat of state.chats.values()) {
    if (chat.loadedOn === state.connection) chat.seenTo = Math.max(0, ...chat.messages.keys());
  }
  const url = new URL(`ws/${encodeURIComponent(state.user)}`, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = (state.socket = new WebSocket(
    url,
    state.token ? ["chat", `bearer.${state.token}`] : [],
  ));
  openedAt = Infinity;
  showState("connecting", "Connecting…");
  expectLife(HANDSHAKE_MS);
  socket.onmessage = ({ data }) => {
    if (socket !== state.socket) return;
    clearTimeout(deadTimer);
    receive(JSON.parse(data));
  };
  socket.onclose = (event) => {
    if (socket === state.socket) lost(event);
  };
  socket.onopen = () => {
    if (socket !== state.socket) return;
    clearTimeout(deadTimer);
    state.connection += 1;
    openedAt = Date.now();
    showState("online", "Connected");
    flush();
    refresh();
  };
}

function lost({ code, reason }) {
  state.socket = null;
  clearTimeout(deadTimer);
  changed("chat");
  if (code === 4403) return showState("refused", `Not allowed: ${reason}`);
  if (code === 4401) showState("refused", "Signed out");
  if (code === 4401) return signInAgain();
  if (code === 1009) {
    // a frame was too long: sending it again would only close the next connection
    const [longest] = state.outbox
      .filter((one) => one.sentOn)
      .sort((a, b) => b.content.length - a.content.length);
    if (longest) refused({ client_msg_id: longest.id, message: "The message is too long." });
  }
  if (Date.now() - openedAt > 5000) attempts = 0; // one that closes at once counts as failed
  retryTimer = setTimeout(
    connect,
    Math.max(300, Math.min(10_000, 300 * 2 ** attempts) * (0.5 + Math.random() / 2)),
  );
  attempts += 1;
  showState("offline", navigator.onLine ? "Reconnecting…" : "Offline");
}

function reconnectNow() {
  if (!state.user || $("sign-in").open) return;
  attempts = 0;
  connect();
}

function sendFrame(frame) {
  if (state.socket?.readyState !== WebSocket.OPEN)
    return notify("Not connected: please try again in a moment.");
  state.socket.send(JSON.stringify(frame));
}

// Sends what has not been sent on this connection: the client_msg_id makes a second time harmless.
function flush() {
  if (state.socket?.readyState !== WebSocket.OPEN) return;
  // only the first message makes a chat, those behind it wait for its echo
  const making = new Set();
  for (const entry of state.outbox.filter(({ error }) => !error)) {
    const { id, chat_id, draft, content, replaces, sentOn } = entry;
    if (chat_id === null && making.has(draft)) continue;
    if (chat_id === null) making.add(draft);
    if (sentOn === state.connection) continue;
    entry.sentOn = state.connection;
    sendFrame({ action: "send_message", chat_id, content, client_msg_id: id, replaces });
    setTimeout(() => {
      // without an echo by now the connection is dead, though nobody has noticed
      if (state.outbox.includes(entry) && !entry.error && entry.sentOn === state.connection)
        reconnectNow();
    }, 15_000);
  }
}

// What happened without a connection is read by HTTP once the socket is open, so that nothing falls
// in between.
async function refresh() {
  const { socket } = state;
  const before = [...state.chats.keys()];
  try {
    const [chats, health] = await Promise.all([loadChats(), api("GET", "health"), openChat()]);
    for (const id of before) if (!chats.has(id) && id !== state.open) state.chats.delete(id);
    $("demo").hidden = (await health.json()).model !== "demo";
  } catch (error) {
    if (socket === state.socket) unloaded(error);
  }
  changed("list");
}

// The page would be out of date: a new connection is a new attempt, with back-off.
function unloaded(error) {
  if (error.status === 401) return;
  notify(`Could not load: ${error.message}`);
  state.socket?.close();
}

async function loadChats(path = userPath("chats")) {
  const response = await api("GET", path);
  const chats = (await response.json()).filter(({ id }) => !state.gone.has(id));
  for (const chat of chats) {
    const known = state.chats.get(chat.id);
    if (known && chat.updated_at > known.activity && chat.id !== state.open) known.unread = true;
    mergeChat(chat);
  }
  const next = /<([^>]*)>;\s*rel="next"/.exec(response.headers.get("Link"))?.[1];
  state.nextPage = next && new URL(next, response.url).href; // relative to the page that it was in
  changed("list");
  return new Set(chats.map(({ id }) => id));
}

async function loadPage(chat, query) {
  const page = await (await api("GET", `api/chats/${chat.id}${query}`)).json();
  if (state.gone.has(chat.id)) throw new Error("This chat has been deleted.");
  mergeChat(page);
  page.messages.forEach(mergeMessage);
  return page;
}

async function loadNewest(chat) {
  const { connection } = state;
  const page = await loadPage(chat, "");
  const oldest = page.messages[0]?.id ?? 0;
  if (chat.loadedOn === 0 || oldest > chat.seenTo) {
    // before it may be a gap: older ones are loaded anew
    for (const id of chat.messages.keys()) if (id < oldest) chat.messages.delete(id);
    chat.hasMore = page.has_more;
  }
  chat.loadedOn = connection;
}

async function loadOlder(chat, limit = 100) {
  if (chat.loading || !chat.hasMore) return;
  chat.loading = true;
  try {
    chat.hasMore = (
      await loadPage(chat, `?limit=${limit}&before=${Math.min(...chat.messages.keys())}`)
    ).has_more;
  } finally {
    chat.loading = false;
    changed("chat");
  }
}

// The open chat is the one in the address: reloading, Back and links to a chat come for free.
async function openChat() {
  const id = /^#[1-9]\d*$/.test(location.hash) ? Number(location.hash.slice(1)) : null;
  if (id !== state.open) {
    Object.assign(state, { open: id, stuck: true });
    views.clear();
    showDraft();
  }
  changed("chat");
  changed("list");
  if (id === null || state.gone.has(id)) return;
  const chat = chatOf(id);
  chat.unread = false;
  if (chat.loadedOn === state.connection) return;
  try {
    await loadNewest(chat);
  } catch (error) {
    if (error.status !== 404 && !state.gone.has(id)) throw error;
    forget(id);
    notify("This chat does not exist, or not any more.");
  }
  changed("chat");
}

// ---- Rendering: at most once per animation frame, and only what has changed ----

// elements of the open chat's messages: kept, so that focus and selection survive
const views = new Map();
const rows = new Map(); // elements of the list of chats
const dirty = new Set(); // "list", "chat", or single replies that have grown

function changed(part) {
  if (dirty.size === 0) requestAnimationFrame(draw);
  dirty.add(part);
}

function draw() {
  const parts = new Set(dirty);
  dirty.clear();
  if (parts.delete("list")) drawList();
  if (parts.has("chat")) drawChat();
  else
    for (const reply of parts)
      if (views.has(reply.task_id)) drawBody(views.get(reply.task_id), reply);
  if (state.stuck) $("messages").scrollTop = $("messages").scrollHeight;
}

const titleOf = (chat) => chat?.title || "Untitled chat";

function drawList() {
  const chats = [...state.chats.values()].filter((chat) => chat.updated_at);
  chats.sort((a, b) => b.activity.localeCompare(a.activity) || b.id - a.id);
  place($("chats"), chats.map(drawRow));
  $("more-chats").hidden = !state.nextPage || $("chats").hidden;
}

function drawRow(chat) {
  if (!rows.has(chat.id)) {
    const link = el("a", { href: `#${chat.id}`, onclick: closeDrawer }, span(), span("", "unseen"));
    const rename = button("✎", () => renameChat(chat.id), { className: "icon" });
    rows.set(
      chat.id,
      el(
        "li",
        {},
        link,
        rename,
        button("✕", () => deleteChat(chat.id), { className: "icon" }),
      ),
    );
  }
  const row = rows.get(chat.id);
  const [link, rename, remove] = row.children;
  const open = chat.id === state.open;
  const running = [...chat.messages.values()].some(isLive);
  row.dataset.chatId = chat.id;
  row.className = [open && "open", running && "running", chat.unread && "unread"]
    .filter(Boolean)
    .join(" ");
  link.firstChild.textContent = link.title = titleOf(chat);
  link.lastChild.textContent = running ? "is being answered" : chat.unread ? "unread" : "";
  link.ariaCurrent = open ? "page" : null;
  rename.ariaLabel = `Rename ${titleOf(chat)}`;
  remove.ariaLabel = `Delete ${titleOf(chat)}`;
  return row;
}

// The conversation as groups: each user message with its replies, and the groups in whose place it
// stands.
function groupsOf(chat) {
  const groups = [];
  for (const message of chat ? sorted(chat) : []) {
    const group = groups.at(-1);
    if (!message.is_ai) groups.push({ id: message.id, asked: [message], replies: [] });
    else if (group && group.id === message.reply_to) group.replies.push(message);
    else groups.push({ id: message.reply_to, asked: [], replies: [message] });
  }
  for (const {
    asked: [{ task_id } = {}],
    replies,
  } of groups) {
    // echoed, and nothing heard yet of its reply
    if (!task_id || replies.some((reply) => reply.task_id === task_id)) continue;
    replies.push({ is_ai: true, chat_id: chat.id, task_id, content: "", status: "streaming" });
  }
  for (const { id, chat_id, draft, content, replaces, error } of state.outbox) {
    if (chat_id !== state.open || (chat_id === null && draft !== state.draft)) continue;
    const status = error ? "refused" : "pending";
    groups.push({
      asked: [{ client_msg_id: id, content, replaces: error ? null : replaces, status, error }],
      replies: [],
    });
  }
  return groups;
}

// An edited message takes the place of its earlier version and of all that followed that: they are
// folded. What stands before the first loaded message isn't known: then all that is loaded followed
// it.
function folded(groups) {
  const shown = [];
  for (const group of groups) {
    const replaces = group.asked[0]?.replaces;
    if (replaces) {
      const out = shown.splice(
        Math.max(
          0,
          shown.findIndex(({ id }) => id === replaces),
        ),
      );
      group.earlier = out.flatMap((one) => [...(one.earlier ?? []), one]);
      group.versions = 1 + (out[0]?.versions ?? 0);
    }
    shown.push(group);
  }
  return shown;
}

function drawGroup({ asked, replies, earlier, versions }, context) {
  const { last, busy, unfinished } = context;
  const drawn = [...asked, ...replies].map((one) => {
    const queued = unfinished.indexOf(one) > 0;
    const retry = one !== replies.at(-1) || context.out ? null : asked[0];
    return drawMessage(one, { last: one === last, queued, busy, out: context.out, retry });
  });
  const older = drawn.splice(asked.length, replies.length - 1);
  if (older.length) {
    const key = `before ${replies[0].id}`;
    drawn.splice(asked.length, 0, drawEarlier(key, `Earlier answers (${older.length})`, older));
  }
  if (earlier?.length) {
    const inside = earlier.flatMap((one) =>
      drawGroup({ ...one, earlier: [] }, { ...context, out: true }),
    );
    const { client_msg_id, id } = asked[0];
    drawn.unshift(
      drawEarlier(`instead ${client_msg_id ?? id}`, `Earlier versions (${versions})`, inside),
    );
  }
  return drawn;
}

function drawChat() {
  const chat = state.chats.get(state.open);
  const groups = groupsOf(chat);
  const shown = folded(groups);
  const unfinished = groups.flatMap(({ replies }) => replies).filter((reply) => !ended(reply));
  const last = unfinished.length ? null : shown.at(-1)?.replies.at(-1);
  const busy =
    unfinished.length > 0 ||
    state.outbox.some(({ chat_id, error }) => chat_id === state.open && !error);
  const wanted = shown.flatMap((group) => drawGroup(group, { last, busy, unfinished }));
  const welcome = chat?.loadedOn === 0 ? "Loading…" : "What is on your mind?";
  if (!wanted.length) wanted.push(el("p", { textContent: welcome }));

  const log = $("messages");
  const anchor = [...log.children].find(
    (node) => node.offsetTop + node.offsetHeight > log.scrollTop,
  );
  const top = anchor?.offsetTop;
  place(log, wanted);
  // what comes in above moves nothing that is read
  if (anchor?.isConnected) log.scrollTop += anchor.offsetTop - top;
  if (log.scrollTop < 300) requestAnimationFrame(loadAbove);
  log.ariaBusy = String(unfinished.length > 0);
  $("stop").hidden = unfinished.length === 0;
  $("stop").disabled = state.socket?.readyState !== WebSocket.OPEN;
  $("title").textContent = document.title = state.open === null ? "New chat" : titleOf(chat);
}

function drawEarlier(key, text, earlier) {
  const details = viewOf(key, () => el("details", { className: "earlier" }, el("summary")));
  details.firstChild.textContent = text;
  place(details, [details.firstChild, ...earlier]);
  return details;
}

function viewOf(key, make) {
  if (!views.has(key)) views.set(key, make());
  return views.get(key);
}

function drawMessage(message, context) {
  const { id, is_ai, task_id, client_msg_id, status, error } = message;
  const view = viewOf(is_ai ? task_id : (client_msg_id ?? id), () => {
    const about = {
      className: `message ${is_ai ? "ai" : "user"}`,
      ariaLabel: is_ai ? "Reply" : "You",
    };
    const body = el("div", { className: "body", dir: "auto" });
    const foot = el("div", { className: "foot" });
    return Object.assign(el("article", about, body, foot), { body, foot });
  });
  drawBody(view, message);
  const { last, queued, busy, out, retry } = context;
  const texts = [Boolean(message.content), Boolean(message.reasoning)];
  const look = [id, status, error, last, queued, busy, out, retry?.id, ...texts].join();
  if (view.look === look) return view;
  view.look = look;
  view.dataset.id = id ?? "";
  view.dataset.status = status;
  view.foot.replaceChildren(
    ...(is_ai ? replyFoot(message, context) : userFoot(message, context, view)),
  );
  return view;
}

function drawBody(view, message) {
  const { is_ai, content } = message;
  drawThoughts(view, message);
  if (view.content === content) return;
  view.content = content;
  if (is_ai) drawMarkdown(view.body, content);
  else view.body.textContent = content;
}

// What the model thought aloud is folded, with the seconds that it took where this page saw it.
function drawThoughts(view, { reasoning, content, status }) {
  if (!reasoning) return;
  if (!view.thoughts) {
    view.thoughts = el(
      "details",
      { className: "thinking" },
      el("summary"),
      el("div", { dir: "auto" }),
    );
    view.body.before(view.thoughts);
  }
  const [summary, text] = view.thoughts.children;
  const thinking = status === "streaming" && !content;
  summary.className = thinking ? "dots" : "";
  if (thinking) view.thinkingSince ??= Date.now();
  else if (view.thinkingSince) view.thoughtMs ??= Date.now() - view.thinkingSince;
  if (thinking) summary.textContent = "Thinking";
  else if (view.thoughtMs !== undefined)
    summary.textContent = `Thought for ${Math.max(1, Math.round(view.thoughtMs / 1000))} s`;
  else summary.textContent = "Thoughts";
  if (text.textContent !== reasoning) text.textContent = reasoning;
}

function replyFoot(reply, { last, queued, busy, out, retry }) {
  const { chat_id, task_id, status, content } = reply;
  const stop = button("Stop this one", () => sendFrame({ action: "abort", chat_id, task_id }));
  if (queued) return [span("Waiting for its turn", "soft dots"), stop];
  if (!ended(reply)) return content || reply.reasoning ? [] : [span("Thinking", "soft dots")];
  const failed = status === "failed";
  const resend = () => write(retry.content, { chat_id, replaces: retry.id });
  return [
    noteOf(reply) && span(noteOf(reply), failed ? "soft bad" : "soft"),
    content && button("Copy", (event) => copy(event.target, content)),
    last && !out && button(failed ? "Try again" : "Regenerate", () => regenerate(chat_id)),
    failed && !last && !busy && retry?.id && button("Try again", resend),
    usageOf(reply) && span(usageOf(reply), "usage soft"),
  ].filter(Boolean);
}

function usageOf({ model, prompt_tokens, completion_tokens }) {
  const counts = [
    [prompt_tokens, "in"],
    [completion_tokens, "out"],
  ].filter(([count]) => Number.isInteger(count));
  const tokens = counts.map(([count, way]) => `${count} ${way}`).join(", ");
  return [model, tokens && `tokens: ${tokens}`].filter(Boolean).join(" · ");
}

const REASONS = {
  model_error: "The model could not answer.",
  model_auth: "The model did not accept the service's credentials.",
  model_rate_limited: "The model has too much to do.",
  model_timeout: "The model took too long.",
  model_incomplete: "The model stopped in the middle of its reply.",
  model_context: "The conversation is too long for the model.",
  internal: "Something went wrong in the service.",
  length: "Cut off: the reply reached its greatest length.",
  content_filter: "Withheld by the model's filter.",
};

function noteOf({ status, finish_reason }) {
  if (status === "aborted") return "Stopped.";
  if (status === "interrupted")
    return "Interrupted: the service was stopped while this reply was written.";
  return REASONS[finish_reason] ?? (status === "failed" ? REASONS.internal : "");
}

function userFoot(message, { busy, out }, view) {
  const { client_msg_id, status, error, content } = message;
  if (status === "pending") return [span("Sending…", "soft")];
  if (status !== "refused") {
    const copying = button("", (event) => copy(event.target, content), {
      className: "icon copy",
      ariaLabel: "Copy",
    });
    const name = {
      className: "icon edit",
      ariaLabel: "Edit message",
      title: "Edit and send again",
    };
    return [copying, !out && !busy && button("", () => editMessage(view, message), name)].filter(
      Boolean,
    );
  }
  const entry = state.outbox.find(({ id }) => id === client_msg_id);
  const retry = () => {
    Object.assign(entry, { error: null, sentOn: 0 });
    setOutbox(state.outbox);
    flush();
  };
  const edit = () => {
    setOutbox(state.outbox.filter((one) => one !== entry));
    setComposer([entry.content, $("composer").value].filter(Boolean).join("\n"));
  };
  const reason = span(`Not sent: ${error}`, "soft bad");
  return [reason, button("Try again", retry), button("Edit", edit)];
}

// The message becomes a field in its place. What is sent takes its place, the model hears no more
// of what followed.
function editMessage(view, { id, chat_id, content }) {
  const area = el("textarea", { value: content, dir: "auto", ariaLabel: "Edit message" });
  area.rows = Math.min(12, content.split("\n").length + 1);
  const end = () => {
    form.remove();
    view.body.hidden = view.foot.hidden = false;
    focusComposer();
  };
  const actions = el(
    "div",
    { className: "row" },
    button("Cancel", end),
    el("button", { textContent: "Send", className: "primary" }),
  );
  const form = el("form", { className: "edit", ariaLabel: "Edit message" }, area, actions);
  form.onsubmit = (event) => {
    event.preventDefault();
    const text = area.value;
    if (!text.trim()) return;
    end();
    write(text, { chat_id, replaces: id });
  };
  form.onkeydown = (event) => {
    if (event.key === "Escape" && !composing(event)) {
      event.stopPropagation();
      end();
    } else if (sends(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  };
  view.body.hidden = view.foot.hidden = true;
  view.append(form);
  area.focus();
}

function announceEnd(reply) {
  const where = reply.chat_id === state.open ? "" : `${titleOf(chatOf(reply.chat_id))}: `;
  $("announcer").textContent = ""; // or the same words a second time wouldn't be read out
  setTimeout(() => {
    $("announcer").textContent =
      where + (reply.status === "complete" ? "Reply finished." : noteOf(reply));
  }, 50);
}

let noticeTimer;

function notify(text) {
  clearTimeout(noticeTimer);
  Object.assign($("notice"), { textContent: text, hidden: false });
  noticeTimer = setTimeout(() => {
    $("notice").hidden = true;
  }, 8000);
}

function showState(name, text) {
  $("state").dataset.state = name;
  $("state").textContent = text;
}

// ---- Wiring: what people do ----

const touch = matchMedia("(pointer: coarse)");

// On a phone the keyboard would cover half of what is to be read: there one taps to write.
function focusComposer() {
  if (!touch.matches) $("composer").focus();
}

function setComposer(text) {
  $("composer").value = text;
  keepDraft(state.open, text);
  growComposer();
  focusComposer();
}

function showDraft() {
  $("composer").value = draftOf(state.open);
  growComposer();
}

// Safari ends an IME's conversion with an Enter that only its keyCode tells from others.
const composing = (event) => event.isComposing || event.keyCode === 229;
const sends = (event) =>
  event.key === "Enter" && !event.shiftKey && !composing(event) && !touch.matches;

function growComposer() {
  $("composer").style.height = "auto";
  $("composer").style.height = `${$("composer").scrollHeight}px`;
}

function submit() {
  const content = $("composer").value;
  if (!content.trim()) return;
  write(content, { chat_id: state.open });
  setComposer("");
}

function write(content, { chat_id, replaces }) {
  state.stuck = true;
  const entry = {
    id: newId(),
    chat_id,
    draft: state.draft,
    content,
    replaces,
    error: null,
    sentOn: 0,
  };
  setOutbox([...state.outbox, entry]);
  flush();
}

function stopAll() {
  if ($("stop").hidden) return;
  sendFrame({ action: "abort", chat_id: state.open });
  focusComposer();
}

function regenerate(chat_id) {
  state.stuck = true;
  sendFrame({ action: "regenerate", chat_id });
  focusComposer();
}

// Returns what was entered, or null if it was cancelled. The browser gives the focus back.
function ask(title, text, ok, input) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  Object.assign($("ask-ok"), {
    textContent: ok,
    className: input === undefined ? "danger" : "primary",
  });
  Object.assign($("ask-input"), { hidden: input === undefined, value: input ?? "" });
  dialog.returnValue = "";
  dialog.showModal();
  if (input === undefined) $("ask-cancel").focus();
  else $("ask-input").select();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "ok" ? $("ask-input").value : null);
  });
}

const attempt = (action) => action().catch((error) => notify(error.message));

async function renameChat(id) {
  const title = await ask("Rename chat", "", "Rename", chatOf(id).title);
  // its `chat` frame does the rest
  if (title?.trim()) await attempt(() => api("PATCH", `api/chats/${id}`, { title }));
}

async function deleteChat(id) {
  const text = `“${titleOf(chatOf(id))}” and all its messages will be gone for good.`;
  if ((await ask("Delete this chat?", text, "Delete")) === null) return;
  await attempt(() => api("DELETE", `api/chats/${id}`));
  $("new-chat").focus();
}

async function showResults() {
  const words = $("search").value.trim();
  const path = userPath(`search?q=${encodeURIComponent(words)}`);
  const found = words ? await (await api("GET", path)).json() : [];
  if (words !== $("search").value.trim()) return;
  const parts = words.toLowerCase().split(/\s+/);
  const titled = words
    ? [...state.chats.values()].filter((chat) => chat.updated_at && fits(titleOf(chat), parts))
    : [];
  $("results").replaceChildren(
    ...titled.map((chat) => {
      return el(
        "li",
        {},
        el("a", { href: `#${chat.id}`, onclick: closeDrawer }, marked(titleOf(chat), parts)),
      );
    }),
    ...found.map(({ chat_id, id, snippet }) => {
      const title = span(titleOf(state.chats.get(chat_id)), "soft");
      const link = el(
        "a",
        { href: `#${chat_id}` },
        title,
        marked(around(snippet, parts), parts, "snippet"),
      );
      link.onclick = (event) => {
        event.preventDefault();
        closeDrawer();
        attempt(() => showFound(chat_id, id));
      };
      return el("li", {}, link);
    }),
  );
  if (!titled.length && !found.length)
    $("results").append(el("li", { className: "soft", textContent: "Nothing found." }));
  $("results").hidden = !words;
  $("chats").hidden = words !== "";
  changed("list");
}

const fits = (text, words) => words.every((word) => text.toLowerCase().includes(word));
const anyOf = (words) =>
  new RegExp(words.map((word) => word.replace(/[^\p{L}\p{N}]/gu, "\\$&")).join("|"), "gi");

// A text with the words that were looked for marked.
function marked(text, words, className) {
  const node = span("", className);
  let at = 0;
  for (const { 0: found, index } of text.matchAll(anyOf(words))) {
    node.append(text.slice(at, index), el("mark", { textContent: found }));
    at = index + found.length;
  }
  node.append(text.slice(at));
  return node;
}

// The first of the words shall be in the lines that are shown.
function around(text, words) {
  const at = text.search(anyOf(words)) - 60;
  return at > 0 ? `…${text.slice(at)}` : text;
}

async function showFound(chatId, id) {
  if (chatId !== state.open) history.pushState(null, "", `#${chatId}`);
  await openChat();
  const chat = chatOf(chatId);
  while (!chat.messages.has(id) && chat.hasMore && !chat.loading) await loadOlder(chat, 1000);
  state.stuck = false;
  changed("chat");
  requestAnimationFrame(() => {
    const node = document.querySelector(`.message[data-id="${id}"]`);
    for (
      let details = node?.closest("details");
      details;
      details = details.parentElement.closest("details")
    ) {
      details.open = true;
    }
    node?.scrollIntoView({ block: "center" });
    node?.classList.add("found");
    setTimeout(() => node?.classList.remove("found"), 3000);
  });
}

// Model, instructions and export of the open chat. A new one is made here if anything is chosen for
// it.
async function openSettings() {
  const chat = state.chats.get(state.open);
  $("instructions").value = chat?.instructions ?? "";
  $("export").hidden = !chat;
  const { default: usual, models } = await (await api("GET", "api/models")).json();
  const option = (value, textContent) => el("option", { value, textContent });
  $("model").replaceChildren(
    option("", `${usual} (default)`),
    ...models.filter((name) => name !== usual).map((name) => option(name, name)),
  );
  $("model").value = chat?.model ?? "";
  if ($("model").selectedIndex < 0) $("model").value = "";
  $("settings").showModal();
}

async function saveSettings() {
  const chat = state.chats.get(state.open);
  const chosen = {
    model: $("model").value || null,
    instructions: $("instructions").value.trim() || null,
  };
  $("settings").close();
  if (chat)
    await api("PATCH", `api/chats/${chat.id}`, chosen); // its `chat` frame does the rest
  else if (chosen.model || chosen.instructions) {
    const made = await (await api("POST", userPath("chats"), chosen)).json();
    mergeChat(made);
    enterMade(made.id);
  }
}

// The whole chat, all pages of it, as a file. What was replaced is left out, as it is folded on the
// page.
async function exportChat() {
  const chat = chatOf(state.open);
  while (chat.hasMore) await loadOlder(chat, 1000);
  const lines = [`# ${titleOf(chat)}`];
  for (const { asked, replies } of folded(groupsOf(chat))) {
    for (const { content } of asked) lines.push("## You", content);
    const reply = replies.at(-1);
    if (reply)
      lines.push(
        "## Reply",
        [reply.content, noteOf(reply) && `*${noteOf(reply)}*`].filter(Boolean).join("\n\n"),
      );
  }
  download(
    `${titleOf(chat)
      .replace(/[^\p{L}\p{N} -]/gu, "_")
      .slice(0, 60)}.md`,
    `${lines.join("\n\n")}\n`,
  );
}

function loadAbove() {
  const chat = state.chats.get(state.open);
  if (chat?.loadedOn && !dirty.has("chat") && $("messages").scrollTop < 300)
    attempt(() => loadOlder(chat));
}

function followBottom() {
  state.stuck = true;
  $("messages").scrollTop = $("messages").scrollHeight;
}

const closeDrawer = () => setDrawer(false);

function setDrawer(open) {
  if (open === document.body.classList.contains("drawer")) return;
  document.body.classList.toggle("drawer", open);
  document.querySelector("main").inert = open;
  $("backdrop").hidden = !open;
  $("menu").ariaExpanded = String(open);
  $(open ? "new-chat" : "menu").focus();
}

// With a token the user is its `sub`. It is only read here, the service checks it.
function userOf(token) {
  try {
    const bytes = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
    return String(
      JSON.parse(new TextDecoder().decode(Uint8Array.from(bytes, (one) => one.charCodeAt(0)))).sub,
    );
  } catch {
    return "";
  }
}

// One sign-in lasts for the browser's session: a new tab asks the others, and a page that opened
// this one may hand a token over: from the same origin, or from one that <meta
// name="token-origins"> lists.
const others = new BroadcastChannel(`sign-in ${location.pathname}`);
const mayHandOver = [location.origin, ...$("token-origins").content.split(/\s+/).filter(Boolean)];

function takeToken(token) {
  if (typeof token !== "string" || !userOf(token) || token === state.token) return;
  sessionStorage.token = token;
  location.reload();
}

let wantsToken = false;

function signInAgain() {
  signIn(true, state.token && EXPIRED);
  wantsToken = true;
  others.postMessage({ type: "chat-token?" });
  for (const origin of mayHandOver) window.opener?.postMessage({ type: "chat-token?" }, origin);
}

others.onmessage = ({ data }) => {
  if (data?.type === "chat-token?" && state.token && !wantsToken) {
    others.postMessage({ type: "chat-token", token: state.token });
  } else if (data?.type === "chat-token" && wantsToken) takeToken(data.token);
};
onmessage = ({ data, origin }) => {
  if (data?.type === "chat-token" && mayHandOver.includes(origin)) takeToken(data.token);
};

// `#token=…` in the address is a token that was handed over; it isn't left there to be copied
// along.
function tokenInAddress() {
  const [, token, chatId] = /^#token=([\w.-]+)(?:&chat=(\d+))?$/.exec(location.hash) ?? [];
  if (!token) return;
  sessionStorage.token = token;
  history.replaceState(
    null,
    "",
    location.pathname + location.search + (chatId ? `#${chatId}` : ""),
  );
}

function signIn(withToken, why) {
  $("name-field").hidden = $("name").disabled = withToken;
  $("token-field").hidden = $("token").disabled = !withToken;
  $("sign-in-why").textContent =
    why || (withToken ? "This service asks for a token." : "Your chats go by this name.");
  if (!$("sign-in").open) $("sign-in").showModal();
}

// Which of the two is asked for is up to the service.
async function changeUser() {
  const probe = await fetch("api/users/guest/chats?limit=1").catch(() => null);
  signIn(probe?.status === 401);
}

let searchTimer;

$("sign-in").querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  const token = $("token").disabled ? "" : $("token").value.trim();
  const user = token ? userOf(token) : $("name").value;
  if (!user) return signIn(true, "This is not a token.");
  sessionStorage.token = token; // a secret: forgotten with the tab
  if (!token) localStorage.user = user;
  history.replaceState(null, "", location.pathname + (user === state.user ? location.hash : ""));
  location.reload(); // nothing of another user stays behind
};
$("sign-in").oncancel = (event) => {
  if (!state.socket) event.preventDefault();
};
$("sign-in").onclose = () => {
  if (!state.socket) $("sign-in").showModal();
};
$("change-user").onclick = changeUser;
$("ask").querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  $("ask").close("ok");
};
$("ask-cancel").onclick = () => $("ask").close();
$("write").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("composer").oninput = () => {
  growComposer();
  keepDraft(state.open, $("composer").value);
};
$("composer").onkeydown = (event) => {
  if (sends(event)) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !$("composer").value) {
    const last = [...document.querySelectorAll("#messages > .user .icon.edit")].at(-1);
    last?.click();
    if (last) event.preventDefault();
  }
};
$("stop").onclick = stopAll;
$("new-chat").onclick = () => {
  location.hash = "";
  closeDrawer();
  focusComposer();
};
$("more-chats").onclick = () => attempt(() => loadChats(state.nextPage));
$("search").oninput = () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(() => attempt(showResults), 250);
};
$("menu").onclick = () => setDrawer(true);
$("close-menu").onclick = $("backdrop").onclick = closeDrawer;
$("newest").onclick = () => {
  followBottom();
  focusComposer();
};
$("messages").onscroll = () => {
  const { scrollTop, scrollHeight, clientHeight } = $("messages");
  state.stuck = $("newest").hidden = scrollHeight - scrollTop - clientHeight < 48;
  loadAbove();
};
new ResizeObserver(() => {
  if (state.stuck) followBottom();
}).observe($("messages"));
matchMedia("(max-width: 45rem)").onchange = closeDrawer;
document.onkeydown = (event) => {
  if (composing(event) || document.querySelector("dialog[open]")) return;
  const writes = event.target.matches("input, textarea, select");
  if (!writes && event.key === "?") $("shortcuts").showModal();
  if (!writes && event.key === "/") {
    event.preventDefault();
    if (getComputedStyle($("sidebar")).visibility === "hidden") setDrawer(true);
    $("search").focus();
  }
  if (event.key !== "Escape") return;
  if (document.body.classList.contains("drawer")) closeDrawer();
  else if (event.target !== $("search")) stopAll();
};
onhashchange = () => openChat().catch(unloaded);
ononline = reconnectNow;
document.onvisibilitychange = () => {
  if (document.hidden) return;
  if (state.socket?.readyState === WebSocket.OPEN) ping();
  else reconnectNow();
};
setInterval(ping, PING_MS);
$("help").onclick = () => $("shortcuts").showModal();
$("settings-open").onclick = () => attempt(openSettings);
$("settings-cancel").onclick = () => $("settings").close();
$("settings").querySelector("form").onsubmit = (event) => {
  event.preventDefault();
  attempt(saveSettings);
};
$("export").onclick = () => attempt(exportChat);
$("theme").value = localStorage.theme ?? "";
$("theme").onchange = () => {
  const { value } = $("theme");
  if (value) localStorage.theme = document.documentElement.dataset.theme = value;
  else {
    delete localStorage.theme;
    delete document.documentElement.dataset.theme;
  }
};
const unfoldedToPrint = [];
onbeforeprint = () => {
  for (const details of document.querySelectorAll("#messages details:not([open])")) {
    details.open = true;
    unfoldedToPrint.push(details);
  }
};
onafterprint = () => {
  for (const details of unfoldedToPrint.splice(0)) details.open = false;
};

tokenInAddress();
state.token = sessionStorage.token ?? "";
state.user =
  userOf(state.token) ||
  (new URLSearchParams(location.search).get("user") ??
    localStorage.user ??
    `guest-${newId().slice(0, 13)}`);
$("name").value = state.user;
if (!$("name").validity.valid) changeUser();
else {
  if (!state.token) localStorage.user = state.user;
  $("who").textContent = state.user;
  setOutbox(
    JSON.parse(sessionStorage[`outbox ${state.user}`] ?? "[]").map((entry) => ({
      ...entry,
      sentOn: 0,
    })),
  );
  state.draft = state.outbox.find(({ chat_id }) => chat_id === null)?.draft ?? state.draft;
  showDraft();
  openChat();
  connect();
  focusComposer();
}
