//go:build fakevz

package image

func init() { keepBzImage = true }
