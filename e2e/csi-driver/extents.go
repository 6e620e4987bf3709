package main

import (
	"fmt"
	"os"
	"unsafe"
)

// extent is a range of an image, in bytes. Two images of one pool that have the same physical
// address share the data: a copy-on-write file system never writes in place.
type extent struct{ offset, length, physical int64 }

const (
	unknownPlace = -1 // data whose place says nothing: never equal to other data
	hole         = -2
)

// struct fiemap and fiemap_extent of linux/fiemap.h
type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

const (
	fiemapRequest   = 0xc020660b
	fiemapSync      = 0x1
	extentLast      = 0x1
	extentUnwritten = 0x800
	// unknown, delayed, encoded, encrypted, inline, tail-packed
	extentNoPlace = 0x2 | 0x4 | 0x8 | 0x80 | 0x200 | 0x400
)

// extents lists where an image has data, without reading it.
func extents(path string) ([]extent, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var q struct {
		start, length             uint64
		flags, mapped, count, pad uint32
		extents                   [512]fiemapExtent
	}
	var all []extent
	for at := uint64(0); ; {
		q.start, q.length, q.flags, q.count, q.mapped = at, ^uint64(0)-at, fiemapSync, uint32(len(q.extents)), 0
		if err := ioctl(f, fiemapRequest, unsafe.Pointer(&q)); err != nil {
			return nil, fmt.Errorf("map the extents of %s: %w", path, err)
		}
		if q.mapped == 0 {
			return all, nil
		}
		for _, x := range q.extents[:q.mapped] {
			place := int64(x.physical)
			if x.flags&extentNoPlace != 0 {
				place = unknownPlace
			}
			if x.flags&extentUnwritten == 0 { // reads as zeros, as a hole does
				all = append(all, extent{int64(x.logical), int64(x.length), place})
			}
			at = x.logical + x.length
			if x.flags&extentLast != 0 {
				return all, nil
			}
		}
	}
}

// changed gives the ranges of target that do not share their data with base; data that base has and
// target lacks (discarded since) is a change too. Both lists are sorted.
func changed(base, target []extent, size int64) []extent {
	var ranges []extent
	for pos := int64(0); pos < size; {
		var b, t, endB, endT int64
		base, b, endB = placeAt(base, pos, size)
		target, t, endT = placeAt(target, pos, size)
		end := min(endB, endT)
		if b != t || b == unknownPlace {
			ranges = append(ranges, extent{pos, end - pos, t})
		}
		pos = end
	}
	return ranges
}

// placeAt says where the data at pos lies and up to where that holds; it drops what lies before pos.
func placeAt(all []extent, pos, size int64) (rest []extent, place, end int64) {
	for len(all) > 0 && all[0].offset+all[0].length <= pos {
		all = all[1:]
	}
	switch {
	case len(all) == 0:
		return all, hole, size
	case all[0].offset > pos:
		return all, hole, min(all[0].offset, size)
	}
	x := all[0]
	place, end = unknownPlace, min(x.offset+x.length, size)
	if x.physical != unknownPlace {
		place = x.physical + pos - x.offset
	}
	return all, place, end
}
