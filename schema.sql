-- The whole database, as numbered steps: each ends with `PRAGMA user_version`. chat_app.py runs the
-- ones that a file has not seen, in one transaction. A step that was released is never changed.
-- Ids are never used twice (AUTOINCREMENT): a link to a deleted chat can't open somebody else's.
-- Timestamps are text as on the wire (docs/protocol.md): they sort as they read.

-- Step 1: version 1.0.0 (its search index is left out: step 2 replaces it)

CREATE TABLE chats (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id    TEXT NOT NULL,
    title      TEXT NOT NULL DEFAULT '',
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;

-- A user's chats, newest activity first.
CREATE INDEX chats_by_activity ON chats (user_id, updated_at, id);

-- A message and its reply are inserted together, the reply right after it: ids are in conversation order.
CREATE TABLE messages (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    chat_id           INTEGER NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
    user_id           TEXT NOT NULL,  -- the chat's owner: tasks and searches are theirs alone
    content           TEXT NOT NULL,
    is_ai             INTEGER NOT NULL CHECK (is_ai IN (0, 1)),
    timestamp         TEXT NOT NULL,
    status            TEXT NOT NULL
                      CHECK (status IN ('complete', 'streaming', 'aborted', 'failed', 'interrupted')),
    task_id           TEXT NOT NULL CHECK (length(task_id) = 36),
    reply_to          INTEGER REFERENCES messages (id) ON DELETE CASCADE,
    finish_reason     TEXT,
    client_msg_id     TEXT,
    model             TEXT,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    CHECK (is_ai = (reply_to IS NOT NULL)),
    CHECK (is_ai OR status = 'complete'),
    CHECK (client_msg_id IS NULL OR NOT is_ai)
) STRICT;

CREATE INDEX messages_by_chat ON messages (chat_id, id);
CREATE UNIQUE INDEX replies_by_task ON messages (task_id) WHERE is_ai;
CREATE INDEX replies_by_message ON messages (reply_to) WHERE reply_to IS NOT NULL;
-- What runs or waits: a few rows at any time. Recovery ends them.
CREATE INDEX streaming ON messages (status, chat_id) WHERE status = 'streaming';

-- Promise 9: what was sent under a client_msg_id. It outlives the message, so that a retry
-- after the chat was deleted is not billed a second time.
CREATE TABLE sends (
    user_id       TEXT NOT NULL,
    client_msg_id TEXT NOT NULL,
    message_id    INTEGER NOT NULL,
    PRIMARY KEY (user_id, client_msg_id)
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 1;

-- Step 2: version 1.1.0

ALTER TABLE chats ADD COLUMN model TEXT;         -- NULL: the service's default
ALTER TABLE chats ADD COLUMN instructions TEXT;  -- what the user wants the model to keep in mind
-- Gone for everybody; its rows are removed in slices.
ALTER TABLE chats ADD COLUMN deleted INTEGER NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1));
CREATE INDEX chats_deleted ON chats (id) WHERE deleted;

ALTER TABLE messages ADD COLUMN reasoning TEXT CHECK (reasoning IS NULL OR is_ai);
-- The earlier user message in whose place this one stands.
ALTER TABLE messages ADD COLUMN replaces INTEGER REFERENCES messages (id) ON DELETE SET NULL
    CHECK (replaces IS NULL OR NOT is_ai);
CREATE INDEX replacements ON messages (chat_id, replaces) WHERE replaces IS NOT NULL;
CREATE INDEX replacements_by_message ON messages (replaces) WHERE replaces IS NOT NULL;

-- Promise 6: what has come of running replies since they began, in order. An ending joins it into
-- the message and empties this.
CREATE TABLE pieces (
    message_id INTEGER NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
    position   INTEGER NOT NULL,
    text       TEXT NOT NULL,
    reasoning  TEXT NOT NULL,
    PRIMARY KEY (message_id, position)
) STRICT, WITHOUT ROWID;

-- Full-text search over finished text. chat_app.py makes the words (search_words): each begins
-- with its owner's key, so that a search never walks through other users' hits. The index holds
-- no text of its own (content = ''); a word's deletion needs the words it was inserted with.
DROP TRIGGER IF EXISTS message_sent;
DROP TRIGGER IF EXISTS reply_settled;
DROP TRIGGER IF EXISTS message_deleted;
DROP TABLE IF EXISTS search;
DROP VIEW IF EXISTS searchable;
CREATE VIRTUAL TABLE search USING fts5 (
    words, content = '', columnsize = 0, tokenize = 'ascii'
);

PRAGMA user_version = 2;
