// Package tree builds a Merkle tree over a journal and signs its head, so that
// anybody with the log's public key can check that a record is in it, and that
// nothing of it was changed or taken back. It answers "prove it". It does not know
// what the records say.
//
// # Folder
//
// A tree is a folder in the layout of C2SP tlog-tiles, which any web server can
// serve and any client of that format reads:
//
//	checkpoint          the newest signed head (C2SP tlog-checkpoint), with cosignatures
//	tile/<L>/<N>        256 hashes of level L, 32 bytes each; <N>.p/<W> while there are only W
//	tile/entries/<N>    256 records, each behind its length in 2 bytes; likewise <N>.p/<W>
//	state               the head that was signed last, and the journal's head then
//	lock                held by the one writer
//
// The leaves are the journal's records, in its order: the index in the tree is the
// index in the journal, and the leaf hash is the record's hash there. The tree does
// not need the journal to prove anything, and entry bundles hold the records' bytes.
//
// # What was signed is never contradicted
//
// The writer follows the journal and takes only what is durable there. It publishes
// in this order, and each step is durable before the next one begins:
//
//  1. tiles and entry bundles, under names that are never used for anything else;
//  2. state: from here on this head counts as signed, though nobody has seen it;
//  3. witnesses, if a quorum of them is required;
//  4. checkpoint.
//
// After a crash at any moment, the tiles behind the state are written again, and
// must then have the same bytes. A start compares the state with the journal (its
// hash chain up to that record), with the right edge of the tree, and with the
// checkpoint. If any of them disagrees, or a file that is to be written exists with
// other content, or a witness has seen another tree, then the writer signs nothing
// more (Tree.Health says why) and changes nothing: a person has to find out what
// happened. The journal, and issuing, go on.
package tree
