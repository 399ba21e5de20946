// Package imageservice keeps container images for virtual machines: it pulls
// them from registries, loads them from archives, and turns every layer, once,
// into an immutable read-only ext4 file that pods link into their layer share.
//
// What is on disk below [Config.Root]:
//
//	blobs/sha256/<hex>    manifests, configs and compressed layers, as fetched
//	layers/<hex>.ext4     one file per diff ID, shared by all images and pods
//	images.db             bbolt: image records and the references to them
//	tmp/                  work in progress; emptied by Open
//
// Guarantees:
//   - A file under its final name is complete, verified and synced: blobs
//     against their digest, layers against the diff ID of the tar they came
//     from. Files appear by rename; the metadata transaction comes last.
//   - A process that dies leaves work behind only in tmp, or files that no
//     record mentions; Open removes both.
//   - Equal blobs and equal layers are fetched and converted once however many
//     callers want them, and one caller that gives up does not fail the others.
//   - An operation that fails leaves nothing behind.
//
// Not promised: that an image runs. Its content is never interpreted beyond
// what the conversion needs, and never becomes a path on the host.
//
// Limits that follow from converting each layer by itself, without its parents:
// an entry below a directory that a lower layer has as a symbolic link makes a
// directory (as overlayfs shows it), and a directory that a layer implies, by an
// entry below it, without an entry of its own gets the attributes of its parent
// instead of those that a lower layer gave it. Docker, BuildKit and buildah
// always write the entry; tools that assemble tars by hand may not. POSIX ACLs
// in a layer are dropped: their tar form is not the on-disk form of ext4.
package imageservice
